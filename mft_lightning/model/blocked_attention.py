"""Causal attention in bfloat16 on a CPU, as matrix products over blocks of queries.

torch's fused attention is slow there on the way back. Here the scores, which exponentials take the digits of, are
float32 as they are there, and all other products bfloat16. Blocks of queries see no key after their last, and weights
are computed again on the way back, so that memory grows with the length and not with its square (as flash attention
does it, https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mft_lightning.model.product_dtype import product_dtype

QUERIES = 256  # of a block (benchmarks/attention.py)


def suits_blocks(query: Tensor, dropout: float) -> bool:
    """Whether :func:`blocked_causal_attention` is the faster one, and can do what is asked."""
    return not dropout and query.device.type == "cpu" and product_dtype(query) == torch.bfloat16


def blocked_causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention in which each token sees itself and those before it.

    Args:
        query: ``[rows, T, head]``; rows are heads, or heads of several sequences of one length.
        key: like ``query``.
        value: like ``query``.
        scale: of the scores.

    Returns:
        ``bfloat16 [rows, T, head]``.
    """
    attended: Tensor = _BlockedAttention.apply(*(states.to(torch.bfloat16) for states in (query, key, value)), scale)
    return attended


class _BlockedAttention(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        attended = torch.empty_like(query)
        for block in _blocks(query):
            attended[:, block] = torch.bmm(_weights(query, key, block, scale), value[:, : block.stop])
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grad, of_query = grad.contiguous(), torch.empty_like(query)
        of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
        for block in _blocks(query):
            seen = slice(0, block.stop)
            weights = _weights(query, key, block, ctx.scale)
            of_value[:, seen] += torch.bmm(weights.transpose(1, 2), grad[:, block])
            of_weights = torch.bmm(grad[:, block], value[:, seen].transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_query[:, block] = torch.bmm(of_scores, key[:, seen])
            of_key[:, seen] += torch.bmm(of_scores.transpose(1, 2), query[:, block])
        return of_query.mul_(ctx.scale), of_key.mul_(ctx.scale), of_value, None


def _blocks(query: Tensor) -> list[slice]:
    length = query.shape[1]
    return [slice(start, min(start + QUERIES, length)) for start in range(0, length, QUERIES)]


def _weights(query: Tensor, key: Tensor, block: slice, scale: float) -> Tensor:
    """What a block of tokens takes of each token up to its last, ``[rows, queries, keys]``."""
    asking, asked = query[:, block].float(), key[:, : block.stop].float()
    least = torch.finfo(asking.dtype).min  # infinity is slow to exponentiate
    later = asking.new_full((block.stop - block.start, block.stop), least).triu_(block.start + 1)
    return torch.baddbmm(later, asking, asked.transpose(1, 2), alpha=scale).softmax(-1).to(query.dtype)
