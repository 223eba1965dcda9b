"""Devices and strategies. This version runs on one device; the keys of the others have their place here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mft_lightning.errors import NotYetError


@dataclass(kw_only=True)
class ParallelSettings:
    """Options of sharded and tensor-parallel training; none is supported yet.

    Args:
        tensor_parallel_size: devices that share one layer's matrices.
        reshard_after_forward: free gathered weights between forward and backward.
        cpu_offload: keep sharded weights in host memory.
    """

    tensor_parallel_size: int = 1
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    def __post_init__(self) -> None:
        if self.tensor_parallel_size != 1:
            raise NotYetError("parallel.tensor_parallel_size", self.tensor_parallel_size, "Use 1.")
        if not self.reshard_after_forward:
            raise NotYetError("parallel.reshard_after_forward", False, "Leave it out.")
        if self.cpu_offload:
            raise NotYetError("parallel.cpu_offload", True, "Leave it out.")


def refuse_several_devices(strategy: Any, devices: Any, num_nodes: int) -> None:
    """Raise for what asks for more than one device.

    Raises:
        NotYetError: naming the key.
    """
    if strategy != "auto":
        raise NotYetError("trainer.strategy", strategy, "Use auto, on one device.")
    if str(devices) not in ("auto", "1") and not (isinstance(devices, list) and len(devices) == 1):
        raise NotYetError("trainer.devices", devices, "Use 1.")
    if num_nodes != 1:
        raise NotYetError("trainer.num_nodes", num_nodes, "Use 1.")
