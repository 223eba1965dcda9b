"""The place of the highest logit is found by blocks; it is torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.model import logit_gradient
from mft_lightning.model.logit_gradient import argmax


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_gradient, "BLOCK", 4)


@given(st.integers(1, 5), st.integers(1, 23), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=300, deadline=None)
def test_the_likeliest_token_is_the_first_of_the_highest(rows: int, width: int, kinds: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(kinds, (rows, width), generator=generator).float()  # of which many are the same
    assert argmax(logits).tolist() == logits.argmax(-1, keepdim=True).tolist()


def test_the_likeliest_of_logits_in_the_middle_of_others() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))[:, 5:45]
    assert argmax(logits).tolist() == logits.argmax(-1, keepdim=True).tolist()
