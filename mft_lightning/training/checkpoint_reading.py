"""How a checkpoint is read: Lightning's dictionary again, whose large tensors may wait until they are asked for."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch

from mft_lightning.errors import UserError, first_line
from mft_lightning.model.adapters import has_adapters
from mft_lightning.model.build import Built
from mft_lightning.model.export import load_initial, load_state, not_whole, twin
from mft_lightning.model.module import NETWORK
from mft_lightning.model.weights import StoredWeights
from mft_lightning.screen import printable, shown
from mft_lightning.training.checkpoint_dirs import METADATA, TRAINER_STATE, read_checkpoint
from mft_lightning.training.shards import has_sharded_optimizer, is_sharded_checkpoint, joined

# what Lightning needs of its dictionary to go on
TRAINER_KEYS = {"global_step", "epoch", "loops", "callbacks", "optimizer_states", "lr_schedulers"}
TRAINER_KEYS |= {"pytorch-lightning_version"}


def read_state(path: Path, built: Built) -> dict[str, Any]:
    """What a checkpoint directory holds for a network; nothing is unpickled that ``weights_only`` would refuse.

    Adapters that begin with a part of the base begin with the checkpoint's from here on. Without the trainer's state,
    where that was dropped: enough to measure the model, not to go on.

    Args:
        path: of the directory.
        built: the network. For a sketch, weights are read and moments mapped when each is asked for.

    Raises:
        UserError: it is damaged, or of another model.
    """
    info = read_checkpoint(path)
    weights = {"state_dict": _Named(_state(built, path), NETWORK)}
    if not info.resumable:
        return {"global_step": info.step, "pytorch-lightning_version": L.__version__, **weights}
    try:
        checkpoint = torch.load(
            path / TRAINER_STATE, map_location="cpu", weights_only=True, mmap=built.weights is not None
        )
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path / TRAINER_STATE}: is damaged ({printable(first_line(error))}).") from error
    if not isinstance(checkpoint, dict) or (missing := TRAINER_KEYS - checkpoint.keys()):
        what = f"lacks {', '.join(sorted(missing))}" if isinstance(checkpoint, dict) else "is no dictionary"
        raise UserError(f"{path / TRAINER_STATE}: is damaged ({what}).")
    if checkpoint["global_step"] != info.step:
        raise UserError(f"{path}: {TRAINER_STATE} is of step {checkpoint['global_step']}, {METADATA} of another.")
    if has_sharded_optimizer(path):
        checkpoint = joined(checkpoint, path, at_once=built.weights is None)
    return {**checkpoint, **weights}


class _Named(Mapping[str, torch.Tensor]):
    """A state whose names begin otherwise; what it makes when it is asked for it goes on doing so."""

    def __init__(self, state: Mapping[str, torch.Tensor], prefix: str) -> None:
        self.state, self.prefix = state, prefix

    def __getitem__(self, name: str) -> torch.Tensor:
        if not name.startswith(self.prefix):
            raise KeyError(name)
        return self.state[name.removeprefix(self.prefix)]

    def __iter__(self) -> Iterator[str]:
        return (self.prefix + name for name in self.state)

    def __len__(self) -> int:
        return len(self.state)


def _state(built: Built, path: Path) -> Mapping[str, torch.Tensor]:
    """The weights in a checkpoint; those of a sketch are read one by one, when each is asked for."""
    sketched = built.weights is not None
    if has_adapters(built.network.model) or not (sketched or is_sharded_checkpoint(path)):
        state = load_state(built.network.model, path)
        if built.start is not None:
            built.start.initial.update(load_initial(built.network.model, path))
        return state
    if not (path / "config.json").is_file():
        raise not_whole(path)
    model = built.weights.model if built.weights is not None else twin(built.network.causal_lm)
    stored = StoredWeights(model, model.dtype, str(path), where=shown(path))
    return stored if sketched else dict(stored)
