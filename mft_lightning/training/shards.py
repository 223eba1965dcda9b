"""Checkpoints whose tensors every rank writes its own part of, by torch.distributed.checkpoint, as safetensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

from mft_lightning.model.export import PART
from mft_lightning.model.weight_files import MODEL_SHARDS, OPTIMIZER_SHARDS, ShardFiles

Tensors = dict[str, Tensor]


class ShardWriter:
    """Writes this rank's parts beside the training. All ranks make one, and write at the same steps."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")  # so that it does not meet the training's collectives

    def meet(self) -> None:
        """Wait until all ranks have come here."""
        dist.barrier(self._group)

    def write(self, directory: Path, tensors: Mapping[str, Tensors]) -> None:
        """Write tensors into directories below one that is there.

        Raises:
            OSError: some rank could not.
        """
        for name, parts in tensors.items():
            files = _files(parts)
            writer = dcp.HuggingFaceStorageWriter(str(directory / name), files, save_distributed=True)
            try:
                dcp.save(parts, storage_writer=writer, process_group=self._group)
            except CheckpointException as error:  # which is no Exception
                rank, (cause, _) = min(error.failures.items())
                raise OSError(f"rank {rank}: {cause}") from error


def _files(parts: Tensors) -> dict[str, int]:
    """The number of the file for each tensor, from 1: the writer has the bytes of a whole file in memory."""
    numbers, number, size = {}, 1, 0
    for name, part in parts.items():
        local = part.to_local() if isinstance(part, DTensor) else part
        if size and size + local.nbytes > PART:
            number, size = number + 1, 0
        numbers[name] = number
        size += local.nbytes
    return numbers


def split_off(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], Tensors, Tensors]:
    """A checkpoint without its large tensors; the weights; and the optimizer's, by number and name."""
    moments: Tensors = {}
    states = []
    for state in checkpoint["optimizer_states"]:
        rest = {}
        for number, values in state["state"].items():
            large = {name: value for name, value in values.items() if isinstance(value, Tensor) and value.ndim}
            moments |= {f"{number}.{name}": value for name, value in large.items()}
            rest[number] = {name: value for name, value in values.items() if name not in large}
        states.append({**state, "state": rest})
    small = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    return {**small, "optimizer_states": states}, dict(checkpoint["state_dict"]), moments


def staged(tensors: Tensors) -> Tensors:
    """This rank's parts in host memory of their own."""
    return BlockingAsyncStager().stage(tensors)


def joined(checkpoint: dict[str, Any], directory: Path, *, at_once: bool) -> dict[str, Any]:
    """A checkpoint with the optimizer's tensors again.

    Args:
        checkpoint: without them, of :func:`split_off`.
        directory: of the checkpoint.
        at_once: read them now, not when each is asked for.
    """
    files = ShardFiles(directory / OPTIMIZER_SHARDS)
    names: dict[str, list[str]] = {}
    for key in files.names():
        number, _, name = key.partition(".")
        names.setdefault(number, []).append(name)
    states = []
    for state in checkpoint["optimizer_states"]:
        whole = {n: _Values(small, files, n, names.get(str(n), [])) for n, small in state["state"].items()}
        states.append({**state, "state": {n: dict(values) for n, values in whole.items()} if at_once else whole})
    return {**checkpoint, "optimizer_states": states}


class _Values(Mapping[str, Any]):
    """What the optimizer keeps of one parameter; its large tensors are read when they are asked for."""

    def __init__(self, small: dict[str, Any], files: ShardFiles, number: int, names: list[str]) -> None:
        self._small, self._files, self._number, self._names = small, files, number, names

    def __getitem__(self, name: str) -> Any:
        return self._files.read(f"{self._number}.{name}") if name in self._names else self._small[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._small, *self._names])

    def __len__(self) -> int:
        return len(self._small) + len(self._names)


def is_sharded_checkpoint(directory: Path) -> bool:
    return (directory / MODEL_SHARDS).is_dir()


def has_sharded_optimizer(directory: Path) -> bool:
    return (directory / OPTIMIZER_SHARDS).is_dir()
