"""Files of weights that cannot be opened, and what is said of them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from mft_lightning.model.weight_files import ADAPTER_FILES, UNREADABLE, open_adapter, why_unreadable


def why(directory: Path) -> str:
    with pytest.raises(UNREADABLE) as caught:
        open_adapter(directory)
    said = why_unreadable(caught.value)
    assert "\n" not in said and "\x1b" not in said
    return said


def test_a_pickle_of_more_than_tensors_is_not_opened(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "settings": argparse.Namespace(lr=1.0)}, tmp_path / ADAPTER_FILES[1])
    assert why(tmp_path).startswith("a file of its weights is damaged, or holds more than tensors and is not opened")


@pytest.mark.parametrize("left", [0.5, 0.99])
def test_a_pickle_that_was_cut_off(tmp_path: Path, left: float) -> None:
    file = tmp_path / ADAPTER_FILES[1]
    torch.save({"a": torch.ones(500)}, file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * left)])
    assert why(tmp_path).startswith("a file of its weights is damaged, or")


def test_other_reasons_are_told_as_they_are(tmp_path: Path) -> None:
    assert "No such file" in why(tmp_path)
