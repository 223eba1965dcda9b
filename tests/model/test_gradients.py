"""The norm is right to the last digits of float32, whatever the sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mft_lightning.model.gradients import BLOCK, clip_gradients, global_norm, telling


@given(
    sizes=st.lists(st.sampled_from([1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK]), max_size=4), seed=st.integers(0, 9)
)
def test_it_is_the_norm_of_one_vector(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(size, generator=generator) for size in sizes]
    expected = math.sqrt(sum(float(value) ** 2 for gradient in gradients for value in gradient))
    assert float(global_norm(gradients)) == pytest.approx(expected, rel=1e-6)  # a block is off by up to 1.1e-7


def test_a_large_gradient_loses_nothing() -> None:
    """torch's own norm of this one is off by 3e-5 on a CPU, and by another 1.5e-5 in two halves."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(1000, 1000, generator=generator) * torch.rand(1000, 1000, generator=generator) ** 8
    expected = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    assert float(global_norm([gradient])) == pytest.approx(expected, rel=1e-7)
    assert float(global_norm([gradient.bfloat16()])) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("limit", [None, 0.0, 1.0])
def test_a_gradient_that_is_not_finite_moves_no_optimizer(bad: float, limit: float | None) -> None:
    """One bad number in one weight costs all weights their step, and AdamW neither decays nor counts it."""
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.5)
    for spoil in (False, True, False):
        optimizer.zero_grad()
        network(torch.ones(1, 3)).square().sum().backward()
        if spoil:
            network[0].bias.grad[2] = bad
        before = [parameter.clone() for parameter in network.parameters()]
        steps = [float(state["step"]) for state in optimizer.state.values()]
        norm = clip_gradients(network, list(network.parameters()), limit)
        optimizer.step()
        same = all(torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))
        assert same == spoil == (not math.isfinite(norm))
        assert ([float(state["step"]) for state in optimizer.state.values()] == steps) == spoil


def test_an_infinite_loss_has_no_finite_gradient() -> None:
    """Of a token that the model gives no chance, cross entropy alone has one."""
    for told in (False, True):
        logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
        loss = nn.functional.cross_entropy(logits, torch.tensor([2]), reduction="sum")
        (telling(loss) if told else loss).backward()
        assert loss.isinf() and bool(logits.grad.isfinite().all()) is not told


def test_a_finite_loss_is_left_alone() -> None:
    loss = torch.tensor(3.0, requires_grad=True)
    telling(loss).backward()
    assert telling(loss) == loss and loss.grad == 1


@pytest.mark.parametrize("size", [3, BLOCK, BLOCK + 3])
def test_a_gradient_whose_squares_overflow_is_dropped_too(size: int) -> None:
    """AdamW would keep their infinite sum for good."""
    parameter = nn.Parameter(torch.zeros(size))
    parameter.grad = torch.full((size,), 1e21)
    assert clip_gradients(nn.Module(), [parameter], None) == math.inf and parameter.grad is None
