"""The norm is right to the last digits of float32, whatever the sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mft_lightning.model.gradients import BLOCK, global_norm


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
