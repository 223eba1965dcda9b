"""The tensors that a model directory or hub id holds, none of them read before it is asked for."""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol, cast
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from mft_lightning.errors import first_line

UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, EOFError, SafetensorError, pickle.UnpicklingError)


def why_unreadable(error: BaseException) -> str:
    """What to say of weights that raised one of ``UNREADABLE``; torch's messages of files are about its own options."""
    if isinstance(error, pickle.UnpicklingError):
        return "a file of its weights is damaged, or holds more than tensors and is not opened; save it as safetensors"
    if "PytorchStreamReader" in str(error):
        return "a file of its weights is damaged, or cut off; copy it again"
    return first_line(error)


MODEL_SHARDS, OPTIMIZER_SHARDS = "shards/model", "shards/optimizer"  # of a sharded checkpoint


class TensorFiles(Protocol):
    """Tensors by the names they have in files."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> Tensor: ...


REPEATED = (".modules_to_save.", ".original_module.")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # peft's, the second of versions before 0.5


def open_adapter(directory: Path) -> TensorFiles:
    """The tensors of a saved adapter, or of a sharded checkpoint of one, by peft's names.

    Raises:
        one of ``UNREADABLE``: there are none, or they are damaged.
    """
    if (shards := directory / MODEL_SHARDS).is_dir():
        return ShardFiles(shards)
    found = [directory / name for name in ADAPTER_FILES if (directory / name).is_file()]
    files = WholeFiles(found[:1] or [directory / ADAPTER_FILES[0]])
    # peft (0.21) saves embeddings that trained whole and had grown again by the names that they had within its model
    names = set(files.names())
    files.leave_out({name for name in names for part in REPEATED if part in name and name.replace(part, ".") in names})
    return files


def open_weights(path: str) -> TensorFiles:
    """The weights of a model directory or hub id, or of a sharded checkpoint.

    Raises:
        one of ``UNREADABLE``: there are none, or they are damaged.
    """
    shards = Path(path) / MODEL_SHARDS
    return ShardFiles(shards) if shards.is_dir() else WholeFiles(_find(path))


class WholeFiles:
    """Safetensors or else PyTorch files, one or several.

    A file of safetensors is opened for every tensor anew: it is mapped into memory, where what was ever read of it
    would count as this process's for as long as it is open.

    Args:
        files: of one model.
    """

    def __init__(self, files: list[Path]) -> None:
        self._mapped: dict[str, tuple[Path, tuple[int, ...]]] = {}
        self._loaded: dict[str, Tensor] = {}
        for file in files:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  # no mapping, but safetensors' own
                        self._mapped[name] = file, tuple(opened.get_slice(name).get_shape())
            else:
                self._loaded |= _loaded(file)

    def leave_out(self, names: Collection[str]) -> None:
        """Have no tensors of these names any more."""
        self._mapped = {name: place for name, place in self._mapped.items() if name not in names}
        self._loaded = {name: tensor for name, tensor in self._loaded.items() if name not in names}

    def names(self) -> list[str]:
        return [*self._mapped, *self._loaded]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._mapped[name][1] if name in self._mapped else tuple(self._loaded[name].shape)

    def read(self, name: str) -> Tensor:
        if name not in self._mapped:
            return self._loaded[name]
        with safe_open(self._mapped[name][0], framework="pt") as opened:
            return opened.get_tensor(name)


class ShardFiles:
    """What torch.distributed.checkpoint wrote with its HuggingFaceStorageWriter, each rank its parts of tensors.

    Args:
        directory: of the safetensors.
    """

    def __init__(self, directory: Path) -> None:
        self._parts: dict[str, list[tuple[Any, tuple[int, ...]]]] = {}
        for file in sorted(directory.glob("*.safetensors")):
            opened = safe_open(file, framework="pt")
            placed = json.loads(opened.metadata()[CUSTOM_METADATA_KEY])
            for name in opened.keys():  # noqa: SIM118  # no mapping, but safetensors' own
                self._parts.setdefault(name, []).append((opened, tuple(placed[name][SAVED_OFFSETS_KEY])))

    def names(self) -> list[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        ends = [
            [start + size for start, size in zip(offset, file.get_slice(name).get_shape(), strict=True)]
            for file, offset in self._parts[name]
        ]
        return tuple(max(along) for along in zip(*ends, strict=True))

    def dtype(self, name: str) -> torch.dtype:
        file, _ = self._parts[name][0]
        return file.get_slice(name)[:0].dtype if file.get_slice(name).get_shape() else file.get_tensor(name).dtype

    def read(self, name: str) -> Tensor:
        parts = [(file.get_tensor(name), offset) for file, offset in self._parts[name]]
        whole = parts[0][0].new_empty(self.shape(name))
        if sum(part.numel() for part, _ in parts) != whole.numel():
            raise ValueError(f"parts of {name} are missing")
        for part, offset in parts:
            whole[tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))] = part
        return whole


def _find(path: str) -> list[Path]:
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (file := _cached(path, whole)) is not None:
            return [file]
        if (listed := _cached(path, index)) is not None:
            names = sorted(set(json.loads(listed.read_text())["weight_map"].values()))
            return [Path(str(cached_file(path, name))) for name in names]
    raise OSError(f"no {SAFE_WEIGHTS_NAME} and no {WEIGHTS_NAME}")


def _loaded(file: Path) -> dict[str, Tensor]:
    """Mapped into memory, so that what is not asked for stays on the disk; a file of before torch 1.6 is read whole."""
    mapped = is_zipfile(file)
    return cast("dict[str, Tensor]", torch.load(file, map_location="cpu", mmap=mapped, weights_only=True))


def _cached(path: str, name: str) -> Path | None:
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
