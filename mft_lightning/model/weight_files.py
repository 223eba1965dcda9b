"""The weights that a model directory or hub id holds, tensor by tensor, none of them read before it is asked for."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, EOFError, SafetensorError, pickle.UnpicklingError)


class WeightFiles:
    """Tensors by the names they have in the files.

    Args:
        path: a model directory or hub id, with safetensors or else PyTorch files; in one file or in several.

    Raises:
        one of ``UNREADABLE``: there are none, or they are damaged.
    """

    def __init__(self, path: str) -> None:
        self._open: dict[str, Any] = {}
        for file in _find(path):
            if file.suffix == ".safetensors":
                opened = safe_open(file, framework="pt")
                self._open |= dict.fromkeys(opened.keys(), opened)
            else:  # mapped into memory, so that what is not asked for stays on the disk
                self._open |= torch.load(file, map_location="cpu", mmap=True, weights_only=True)

    def names(self) -> list[str]:
        return list(self._open)

    def shape(self, name: str) -> tuple[int, ...]:
        found = self._open[name]
        return tuple(found.shape if isinstance(found, Tensor) else found.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        found = self._open[name]
        return found if isinstance(found, Tensor) else found.get_tensor(name)


def _find(path: str) -> list[Path]:
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (file := _cached(path, whole)) is not None:
            return [file]
        if (listed := _cached(path, index)) is not None:
            names = sorted(set(json.loads(listed.read_text())["weight_map"].values()))
            return [Path(str(cached_file(path, name))) for name in names]
    raise OSError(f"no {SAFE_WEIGHTS_NAME} and no {WEIGHTS_NAME}")


def _cached(path: str, name: str) -> Path | None:
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
