"""The speed of products is that of the best one, and nothing else is touched by measuring it."""

from __future__ import annotations

import pytest
import torch

from mft_lightning.model import gemm_peak
from mft_lightning.model.gemm_peak import gemm_speed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_product_counts_and_the_global_generator_stays(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    rates = iter([1e9, 5e9, 2e9, 2e9, 1e9, 2e9])  # operations a second, of two products of each size
    sizes = []

    def timed(*matrices: torch.Tensor) -> float:
        assert {matrix.dtype for matrix in matrices} == {dtype}
        sizes.append(len(matrices[0]))
        return 2 * sizes[-1] ** 3 / next(rates)

    monkeypatch.setattr(gemm_peak, "SIZES", (16, 32, 64, 128))
    monkeypatch.setattr(gemm_peak, "LONG_ENOUGH", 2 * 64**3 / 3e9)
    monkeypatch.setattr(gemm_peak, "_seconds", timed)
    state = torch.get_rng_state()
    assert gemm_speed(torch.device("cpu"), dtype, seconds=0) == pytest.approx(5e9)
    assert sizes == [16, 16, 32, 32, 64, 64] and torch.equal(torch.get_rng_state(), state)
