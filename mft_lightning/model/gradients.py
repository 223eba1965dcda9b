"""The norm of a step's gradient over all ranks, however it is shared out among them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

BLOCK = 1024  # elements whose squares are added up in float32


def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients taken as one vector, ``float64 []``, the same on every rank.

    Squares are added up in blocks, and the blocks in float64: one sum over 25 million float32 gradients is off by a
    thousandth on a CPU, and otherwise on half of them (``torch.linalg.vector_norm`` in torch 2.13).

    Args:
        gradients: whole ones, the same on every rank, or shards of FSDP2; then all ranks must ask.
    """
    whole: list[Tensor] = []
    shards: list[Tensor] = []
    group = None
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            group = gradient.device_mesh.get_group()
            shards.append(_squares(gradient.to_local()))
        else:
            whole.append(_squares(gradient))
    total = torch.stack(whole or [torch.zeros((), dtype=torch.float64)]).sum()
    if shards:
        shared = torch.stack(shards).sum()
        dist.all_reduce(shared, group=group)
        total = total.to(shared.device) + shared
    return total.sqrt()


def _squares(gradient: Tensor) -> Tensor:
    """The sum of a tensor's squares, ``float64 []``."""
    flat = gradient.detach().flatten()
    even = len(flat) // BLOCK * BLOCK
    kind = torch.promote_types(flat.dtype, torch.float32)
    blocks = torch.linalg.vector_norm(flat[:even].view(-1, BLOCK), dim=1, dtype=kind)
    return blocks.double().square().sum() + flat[even:].double().square().sum()
