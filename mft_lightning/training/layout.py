"""How many devices a run has: what the configuration asks for, the machine has, and a launcher has started."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mft_lightning.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Devices of each node (a number, or which ones), and nodes."""

    devices: Any
    count: int
    nodes: int

    @property
    def total(self) -> int:
        return self.count * self.nodes


def find_layout(accelerator: Any, devices: Any, num_nodes: int) -> Layout:
    """The layout of a run; what torchrun started stands for what is left open.

    Args:
        accelerator: ``trainer.accelerator``.
        devices: ``trainer.devices``, where "auto" is open.
        num_nodes: ``trainer.num_nodes``, where 1 is open.

    Raises:
        UserError: devices that are not there, or others than torchrun has started processes for.
    """
    if not TorchElasticEnvironment.detect():
        return Layout(devices, _count(accelerator, devices, num_nodes), num_nodes)
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    count = local if devices == "auto" else _count(accelerator, devices, num_nodes)
    nodes = max(1, world // local)
    if count != local:
        raise UserError(
            f"trainer.devices: {devices} asks for {count} on each node, but torchrun started {local} process(es) on "
            f"this one. Give torchrun --nproc-per-node {count}, or leave trainer.devices out."
        )
    if num_nodes not in (1, nodes):
        raise UserError(
            f"trainer.num_nodes: {num_nodes}, but torchrun started processes on {nodes}. Give torchrun --nnodes "
            f"{num_nodes}, or leave trainer.num_nodes out."
        )
    return Layout(local if devices == "auto" else devices, count, nodes)


def _count(accelerator: Any, devices: Any, num_nodes: int) -> int:
    """Devices of a node, as Lightning counts them."""
    asked: dict[str, Any] = {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run's own Trainer gives them
            trainer = L.Trainer(**asked, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    except (MisconfigurationException, ModuleNotFoundError, ValueError, TypeError) as error:
        raise UserError(f"trainer: {error}") from error
    return trainer.num_devices
