"""Attention in blocks of queries is causal attention, in memory that grows with the length alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mft_lightning.model.blocked_attention import QUERIES, blocked_causal_attention, suits_blocks
from mft_lightning.model.product_dtype import computes_bfloat16
from tests.model.largest import Largest


def states(rows: int, length: int, seed: int = 0, spread: float = 1.0) -> list[Tensor]:
    """Query, key and value, as a layer gives them: heads beside each other in every token."""
    generator = torch.Generator().manual_seed(seed)
    all_heads = torch.randn(length, rows, 3 * 16, generator=generator) * spread
    parts = all_heads.bfloat16().transpose(0, 1).chunk(3, dim=-1)
    return [part.detach().requires_grad_() for part in parts]


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-9))


LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([QUERIES, QUERIES + 1, 2 * QUERIES + 3]))


@given(
    rows=st.integers(1, 4),
    lengths=st.lists(LENGTHS, min_size=1, max_size=3),
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    mixed=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_it_is_torchs_attention_in_float64(
    rows: int, lengths: list[int], seed: int, spread: float, mixed: bool
) -> None:
    """Of each conversation by itself, under autocast too."""
    ours = states(rows, sum(lengths), seed, spread)
    exact = [part.detach().double().requires_grad_() for part in ours]
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = blocked_causal_attention(*ours, lengths, scale=0.3)
    alone = zip(*(part.split(lengths, dim=1) for part in exact), strict=True)
    expected = torch.cat([F.scaled_dot_product_attention(*one, is_causal=True, scale=0.3) for one in alone], dim=1)
    assert found.dtype == torch.bfloat16
    assert error(found, expected) < 4e-3
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, exact, towards)
    scale = max(float(gradient.norm()) for gradient in wanted)
    for one, other in zip(torch.autograd.grad(found, ours, towards.bfloat16()), wanted, strict=True):
        assert float((one.double() - other).norm()) < 3e-2 * scale  # a query's is nothing where it sees itself alone


def test_no_token_sees_a_later_one() -> None:
    length = 2 * QUERIES + 10
    query, key, value = (part.detach() for part in states(2, length))
    before = blocked_causal_attention(query, key, value, [length], 0.25)
    for place in (QUERIES - 1, QUERIES, QUERIES + 1, 2 * QUERIES):
        changed = [part.clone() for part in (key, value)]
        for part in changed:
            part[:, place] = 9.0
        after = blocked_causal_attention(query, *changed, [length], 0.25)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place:], before[:, place:])


def test_no_square_of_the_length_stands_in_memory() -> None:
    length = 4 * QUERIES
    with Largest() as largest:
        blocked_causal_attention(*states(1, length), [length], 0.25).sum().backward()
    assert largest.elements == length * QUERIES


@pytest.mark.skipif(not computes_bfloat16(), reason="this CPU has no instructions for bfloat16")
def test_it_is_for_bfloat16_products_without_dropout() -> None:
    whole, half = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert suits_blocks(half, 0.0)
    assert not suits_blocks(half, 0.1)
    assert not suits_blocks(whole, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert suits_blocks(whole, 0.0)
    with torch.autocast("cpu", torch.float16):
        assert not suits_blocks(half, 0.0)
