"""What sharded data parallelism (FSDP2) does to a network: which modules are sharded, and how they are gathered.

Every transformer layer is a unit that is gathered for its own forward and backward; what is left (embeddings, last
norm, head) belongs to the whole, whose forward includes the loss, so that no weight is read outside the forward that
gathers it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate

from mft_lightning import ranks
from mft_lightning.errors import UserError
from mft_lightning.model.supervised_loss import SupervisedLM
from mft_lightning.model.tensor_parallel import split_head, split_layer


@dataclass(kw_only=True)
class ParallelSettings:
    """Options of training on several devices.

    Args:
        tensor_parallel_size: fsdp: neighbouring devices that share each layer's matrices. It divides the devices, which
            then share out data in groups.
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
        mesh: ``data_parallel``, and ``tensor_parallel`` where that is more than one.
        settings: whether to keep gathered weights, where the sharded ones lie, and how many share a layer.
        precision: ``trainer.precision``.
        complete: gives a part of a sketch its weights, which is sharded before the next part has its own.

    Raises:
        UserError: a model whose layers are not known.
    """
    on_gpu = mesh.device_type == "cuda"
    options: dict[str, Any] = {
        "mesh": mesh["data_parallel"],
        "mp_policy": MIXED_PRECISION.get(precision, MixedPrecisionPolicy()),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu) if settings.cpu_offload else OffloadPolicy(),
    }
    for layer in transformer_layers(network):
        complete(layer)
        if settings.tensor_parallel_size > 1:
            split_layer(layer, network.causal_lm.config.model_type, mesh["tensor_parallel"])
        fully_shard(layer, reshard_after_forward=settings.reshard_after_forward, **options)
    complete(network)
    if settings.tensor_parallel_size > 1:
        split_head(network.causal_lm, mesh["tensor_parallel"])
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
    if not isinstance(tensor, DTensor):
        return tensor
    for axis in range(tensor.device_mesh.ndim):  # one after the other, or torch warns that it does so
        tensor = tensor.redistribute(placements=[Replicate()] * (axis + 1) + list(tensor.placements[axis + 1 :]))
    return tensor.to_local()


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
        target.to_local().copy_(_share(whole, target))
    else:
        target.copy_(whole)


def _share(whole: Tensor, like: DTensor) -> Tensor:
    """This rank's part of a tensor that is sharded as another one: first over those that share a layer."""
    mesh, place = like.device_mesh, like.device_mesh.get_coordinate()
    assert place is not None
    for axis in reversed(range(mesh.ndim)):
        dim = getattr(like.placements[axis], "dim", None)
        if dim is None:  # replicated
            continue
        parts = whole.chunk(mesh.size(axis), dim)
        whole = parts[place[axis]] if place[axis] < len(parts) else whole.narrow(dim, 0, 0)
    return whole


def data_parallel_group(trainer: L.Trainer) -> Any:
    """The process group of the ranks that share out the data, where it is not the whole world."""
    mesh = getattr(trainer.strategy, "device_mesh", None)
    return None if mesh is None else mesh["data_parallel"].get_group()


def summed_over_data(trainer: L.Trainer, part: Tensor) -> Tensor:
    """A tensor added up, in place, over the ranks that share out the data."""
    if ranks.are_several():
        dist.all_reduce(part, group=data_parallel_group(trainer))
    return part
