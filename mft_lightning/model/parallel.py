"""What sharded data parallelism (FSDP2) does to a network: which modules are sharded, and how they are gathered.

Every transformer layer is a unit that is gathered for its own forward and backward; what is left (embeddings, last
norm, head) belongs to the whole, whose forward includes the loss, so that no weight is read outside the forward that
gathers it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from mft_lightning.errors import NotYetError, UserError
from mft_lightning.model.supervised_loss import SupervisedLM


@dataclass(kw_only=True)
class ParallelSettings:
    """Options of training on several devices.

    Args:
        tensor_parallel_size: devices that share one layer's matrices; not supported yet.
        reshard_after_forward: fsdp: free a layer's gathered weights after its forward and gather them again for its
            backward. Without it they are kept: more memory, less communication.
        cpu_offload: fsdp: keep sharded weights, gradients and optimizer states in host memory (not yet run on a GPU).
        find_unused_parameters: ddp: look in every step for weights that the loss does not depend on; only for models
            that have such.
    """

    tensor_parallel_size: int = 1
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    find_unused_parameters: bool = False

    def __post_init__(self) -> None:
        if self.tensor_parallel_size != 1:
            raise NotYetError("parallel.tensor_parallel_size", self.tensor_parallel_size, "Use 1.")


# trainer.precision -> how gathered weights are held, and gradients reduced
MIXED_PRECISION = {
    "bf16-mixed": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    "bf16-true": MixedPrecisionPolicy(reduce_dtype=torch.float32),
}


def shard(
    network: SupervisedLM,
    mesh: DeviceMesh,
    settings: ParallelSettings,
    precision: str,
    complete: Callable[[nn.Module], None] = lambda part: None,
) -> None:
    """Shard a network's weights over the devices of ``mesh``, in place, a layer at a time.

    Args:
        network: with its full weights, the same on every rank; or a sketch.
        mesh: one dimension, the data-parallel ranks.
        settings: whether to keep gathered weights, and where the sharded ones lie.
        precision: ``trainer.precision``.
        complete: gives a part of a sketch its weights, which is sharded before the next part has its own.

    Raises:
        UserError: a model whose layers are not known.
    """
    on_gpu = mesh.device_type == "cuda"
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MIXED_PRECISION.get(precision, MixedPrecisionPolicy()),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu) if settings.cpu_offload else OffloadPolicy(),
    }
    for layer in transformer_layers(network):
        complete(layer)
        fully_shard(layer, reshard_after_forward=settings.reshard_after_forward, **options)
    complete(network)
    fully_shard(network, **options)
    register_fsdp_forward_method(network, "generate")


def transformer_layers(network: SupervisedLM) -> list[nn.Module]:
    """The model's transformer layers: what transformers itself would not split over devices.

    Raises:
        UserError: a model that does not tell.
    """
    model = network.causal_lm
    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise UserError(f"trainer.strategy: the layers of a {model.config.model_type} are not known. Use ddp.")
    return layers


WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of FSDP1, of its activation checkpointing


def live_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's parameters by the names they had before FSDP1 wrapped parts of it."""
    for name, parameter in module.named_parameters():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        yield name, parameter


def is_sharded(network: nn.Module) -> bool:
    """Whether the forward of a network gathers its weights from all ranks."""
    return isinstance(network, FSDPModule)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank; all ranks must ask. Another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered_state(state: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """The tensors of a state, however deep in it, gathered one after the other into host memory of their own.

    Args:
        state: the same keys on every rank.
        keep: whether this rank wants them; the others only take part.
    """

    def whole(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: whole(item) for key, item in value.items()}
        if isinstance(value, list):
            return [whole(item) for item in value]
        if isinstance(value, Tensor):
            full = gathered(value.detach())
            return full.to("cpu", copy=_memory(full) == _memory(value)) if keep else full.new_empty(0)
        return value

    return cast("dict[str, Any]", whole(state))


def _memory(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()


def fill(target: Tensor, whole: Tensor) -> None:
    """Copy a tensor that every rank has the whole of into one that may be sharded; nothing is communicated."""
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        source = distribute_tensor(whole.to(mesh.device_type), mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(source.to_local())
    else:
        target.copy_(whole)
