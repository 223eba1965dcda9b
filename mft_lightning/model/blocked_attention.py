"""Causal attention in bfloat16 on a CPU, as matrix products over blocks of queries.

torch's fused attention is slow there on the way back. Here the scores, which exponentials take the digits of, are
float32 as they are there, and all other products bfloat16. Blocks of queries see no key after their last, and weights
are computed again on the way back, so that memory grows with the length and not with its square (as flash attention
does it, https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mft_lightning.model.product_dtype import product_dtype

QUERIES = 256  # of a block (benchmarks/attention.py)


def suits_blocks(query: Tensor, dropout: float) -> bool:
    """Whether :func:`blocked_causal_attention` is the faster one, and can do what is asked."""
    return not dropout and query.device.type == "cpu" and product_dtype(query) == torch.bfloat16


def blocked_causal_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Attention in which each token sees itself and those before it in its conversation.

    Args:
        query: ``[heads, T, head]``.
        key: like ``query``.
        value: like ``query``.
        lengths: of the conversations laid end to end, of sum ``T``.
        scale: of the scores.

    Returns:
        ``bfloat16 [heads, T, head]``, the heads of a token beside each other in memory.
    """
    states = (one.to(torch.bfloat16).contiguous() for one in (query, key, value))
    attended: Tensor = _BlockedAttention.apply(*states, tuple(lengths), scale)
    return attended


class _BlockedAttention(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # which would make scores bfloat16
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.lengths, ctx.scale = lengths, scale
        heads, tokens, head = query.shape
        attended = query.new_empty(tokens, heads, head).transpose(0, 1)
        for block, seen in _blocks(lengths):
            attended[:, block] = torch.bmm(_weights(query[:, block], key[:, seen], scale), value[:, seen])
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grad, of_query = grad.contiguous(), torch.empty_like(query)
        of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
        for block, seen in _blocks(ctx.lengths):
            weights = _weights(query[:, block], key[:, seen], ctx.scale)
            of_value[:, seen] += torch.bmm(weights.transpose(1, 2), grad[:, block])
            of_weights = torch.bmm(grad[:, block], value[:, seen].transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_query[:, block] = torch.bmm(of_scores, key[:, seen])
            of_key[:, seen] += torch.bmm(of_scores.transpose(1, 2), query[:, block])
        return of_query.mul_(ctx.scale), of_key.mul_(ctx.scale), of_value, None, None


def _blocks(lengths: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """The queries of each block, and the keys up to its last, as places in the row."""
    start = 0
    for length in lengths:
        end = start + length
        for first in range(start, end, QUERIES):
            last = min(first + QUERIES, end)
            yield slice(first, last), slice(start, last)
        start = end


def _weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """What the last tokens take of each token up to them, ``[heads, queries, keys]``."""
    queries, keys = query.shape[1], key.shape[1]
    asking, asked = query.float(), key.float()
    least = torch.finfo(asking.dtype).min  # infinity is slow to exponentiate
    later = asking.new_full((queries, keys), least).triu_(keys - queries + 1)
    return torch.baddbmm(later, asking, asked.transpose(1, 2), alpha=scale).softmax(-1).to(query.dtype)
