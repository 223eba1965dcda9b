"""A step's gradient over all ranks: when it is reduced, its norm, and what becomes of one that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

BLOCK = 1024  # elements whose squares are added up in float32
CAST = 2048  # blocks that a CPU casts to it at a time, in memory that it has already


@contextmanager
def gradients_kept_local(network: nn.Module) -> Iterator[None]:
    """Backward passes inside add up gradients on each rank; the next one after it reduces them over the ranks.

    DDP needs nothing: it reduces only in a backward that begins after its own forward, which is the whole step's.
    """
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            network.set_requires_gradient_sync(True)
    elif isinstance(network, FullyShardedDataParallel):
        with network.no_sync():
            yield
    else:
        yield


def clip_gradients(network: nn.Module, parameters: Sequence[nn.Parameter], limit: float | None) -> float:
    """Scale a step's gradient down to the norm ``limit``, if there is one; the norm it had, on every rank the same.

    A gradient whose norm is not finite is dropped: an optimizer passes over weights that have none, so that neither
    they nor its state change. To know it the host waits for the device, once a step.

    Args:
        network: that has the parameters, as it is wrapped for the ranks.
        parameters: those that train.
        limit: of the global 2-norm; None and 0 are no limit.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    measured = global_norm((parameter.grad for parameter in with_gradient if parameter.grad is not None), network)
    norm = float(measured)
    if not math.isfinite(norm):
        for parameter in with_gradient:
            parameter.grad = None
    elif limit:
        for together in by_mesh(with_gradient).values():
            torch.nn.utils.clip_grads_with_norm_(together, limit, measured)
    return norm


def by_mesh(parameters: Iterable[nn.Parameter]) -> dict[Any, list[nn.Parameter]]:
    """Parameters by the devices they are shared out over; torch takes several at once only where these are the same."""
    found: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return found


def telling(loss: Tensor) -> Tensor:
    """The loss, with a gradient of NaN where it is not finite itself: all ranks learn of it when they add theirs up.

    Else the gradient might well be finite: that of an infinite NLL of a token which the model gives no chance is.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def global_norm(gradients: Iterable[Tensor], network: nn.Module | None = None) -> Tensor:
    """The 2-norm of all gradients taken as one vector, ``float64 []``, the same on every rank.

    Squares are added up in blocks, and the blocks in float64: one sum over 25 million float32 gradients is off by a
    thousandth on a CPU, and otherwise on half of them (``torch.linalg.vector_norm`` in torch 2.13).

    Args:
        gradients: whole ones, the same on every rank, or shards of FSDP2 or FSDP1; then all ranks must ask.
        network: that they are of, where it is FSDP1's, whose shards do not tell that they are, and of which a rank may
            have none.
    """
    whole: list[Tensor] = []
    shards: dict[tuple[Any, ...], list[Tensor]] = {}  # by the groups to add them up over
    flat = network if isinstance(network, FullyShardedDataParallel) else None
    if flat is not None:
        shards[(flat.process_group,)] = [torch.zeros((), dtype=torch.float64, device=flat.compute_device)]
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            shards.setdefault(_groups(gradient), []).append(_squares(gradient.to_local()))
        elif flat is not None:
            shards[(flat.process_group,)].append(_squares(gradient).to(flat.compute_device))
        else:
            whole.append(_squares(gradient))
    total = torch.stack(whole or [torch.zeros((), dtype=torch.float64)]).sum()
    for groups, parts in shards.items():
        shared = torch.stack(parts).sum()
        for group in groups:
            dist.all_reduce(shared, group=group)
        total = total.to(shared.device) + shared
    return total.sqrt()


def _groups(gradient: DTensor) -> tuple[Any, ...]:
    """Those over which a tensor is sharded; over the others of its mesh it is the same."""
    mesh = gradient.device_mesh
    return tuple(mesh.get_group(axis) for axis, how in enumerate(gradient.placements) if not how.is_replicate())


def _squares(gradient: Tensor) -> Tensor:
    """The sum of a tensor's squares, ``float64 []``."""
    flat = gradient.detach().flatten()
    even = len(flat) // BLOCK * BLOCK
    kind = torch.promote_types(flat.dtype, torch.float32)
    blocks = flat[:even].view(-1, BLOCK)
    together = CAST if flat.device.type == "cpu" and flat.dtype != kind else max(1, len(blocks))
    norms = [torch.linalg.vector_norm(some, dim=1, dtype=kind) for some in blocks.split(together)]
    rest = torch.linalg.vector_norm(flat[even:], dtype=kind)  # as a block: what overflows there does so here
    return torch.cat(norms).double().square().sum() + rest.double().square()
