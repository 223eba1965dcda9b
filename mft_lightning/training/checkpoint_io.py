"""How a checkpoint is written: a Hugging Face directory plus the trainer's state, aside first and then renamed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from lightning.pytorch.plugins.io import CheckpointIO

import mft_lightning
from mft_lightning.errors import UserError, first_line
from mft_lightning.model.export import load_state, save_model
from mft_lightning.model.module import NETWORK, MFTModule
from mft_lightning.training.checkpoint_dirs import FORMAT_VERSION, METADATA, TRAINER_STATE, read_metadata

# what Lightning needs of its dictionary to go on
TRAINER_KEYS = {"global_step", "epoch", "loops", "callbacks", "optimizer_states", "lr_schedulers"}
TRAINER_KEYS |= {"pytorch-lightning_version"}


class HFCheckpointIO(CheckpointIO):
    """Writes and reads checkpoint directories for one module.

    A directory holds the model as ``from_pretrained`` (or ``PeftModel.from_pretrained``) reads it, the tokenizer with
    its chat template, ``trainer.pt`` (everything else Lightning saves; loads with ``weights_only=True``), and
    ``checkpoint.json`` for the eye. Weights stand in it once.
    """

    def __init__(self, module: MFTModule) -> None:
        self.module = module
        self._preloaded: dict[Path, dict[str, Any]] = {}

    def preload(self, path: Path) -> None:
        """Load a checkpoint ahead of the run, so that one that cannot be loaded stops it before anything is written."""
        self._preloaded[path] = self.load_checkpoint(path)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` (Lightning's dictionary) as the directory ``path``.

        Args:
            checkpoint: its ``state_dict`` goes to safetensors, the rest to ``trainer.pt``.
            path: the new directory; an existing one is replaced.
            storage_options: ``epoch_end`` and ``metrics`` for ``checkpoint.json``.
        """
        path = Path(path)
        aside = path.parent / f".{path.name}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        network = self.module.network
        assert network is not None
        state = {name.removeprefix(NETWORK): value for name, value in checkpoint["state_dict"].items()}
        save_model(network.model, state, aside)
        datamodule = self.module.datamodule
        datamodule.tokenizer.save_pretrained(aside)
        network.causal_lm.generation_config.save_pretrained(aside)
        torch.save({key: value for key, value in checkpoint.items() if key != "state_dict"}, aside / TRAINER_STATE)
        metadata = {
            "format": FORMAT_VERSION,
            "step": checkpoint["global_step"],
            "epoch": checkpoint["epoch"],
            "epoch_end": False,
            "metrics": {},
            "tasks": datamodule.task_names,
            "fingerprint": self.module.fingerprint(datamodule),
            "chat_format": {"normalize_punctuation": datamodule.chat_format.normalize_punctuation},
            "versions": {
                "mft_lightning": mft_lightning.__version__,
                "torch": torch.__version__,
                "lightning": L.__version__,
                "transformers": transformers.__version__,
                "peft": version("peft"),
            },
            **(storage_options or {}),
        }
        (aside / METADATA).write_text(json.dumps(metadata, indent=2) + "\n")
        for file in aside.iterdir():
            _sync(file)
        _put_in_place(aside, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Lightning's dictionary again; nothing is unpickled that ``weights_only`` would refuse."""
        path = Path(path)
        if path in self._preloaded:
            return self._preloaded.pop(path)
        read_metadata(path)
        if not (path / TRAINER_STATE).is_file():
            raise UserError(f"{path}: holds no {TRAINER_STATE}, so a run cannot go on from it.")
        assert self.module.network is not None
        try:
            checkpoint = torch.load(path / TRAINER_STATE, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(f"{path / TRAINER_STATE}: is damaged ({first_line(error)}).") from error
        if not isinstance(checkpoint, dict) or (missing := TRAINER_KEYS - checkpoint.keys()):
            what = f"lacks {', '.join(sorted(missing))}" if isinstance(checkpoint, dict) else "is no dictionary"
            raise UserError(f"{path / TRAINER_STATE}: is damaged ({what}).")
        if checkpoint["global_step"] != read_metadata(path)["step"]:
            raise UserError(f"{path}: {TRAINER_STATE} is of step {checkpoint['global_step']}, {METADATA} of another.")
        state = load_state(self.module.network.model, path)
        checkpoint["state_dict"] = {NETWORK + name: value for name, value in state.items()}
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(aside: Path, path: Path) -> None:
    if path.exists():
        replaced = path.parent / f".{path.name}.replaced"
        path.rename(replaced)
        aside.rename(path)
        shutil.rmtree(replaced)
    else:
        aside.rename(path)
    _sync(path.parent)
