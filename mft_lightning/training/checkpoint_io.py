"""How a checkpoint is written: a Hugging Face directory plus the trainer's state, aside first and then renamed."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError

import mft_lightning
from mft_lightning.aside import aside_of, remove_directory, written_aside
from mft_lightning.data.tokenizer import save_tokenizer
from mft_lightning.errors import UserError, first_line
from mft_lightning.model.export import ModelWriter
from mft_lightning.model.module import NETWORK, MFTModule
from mft_lightning.model.weight_files import MODEL_SHARDS, OPTIMIZER_SHARDS
from mft_lightning.screen import shown
from mft_lightning.training.background import Background
from mft_lightning.training.checkpoint_dirs import (
    FORMAT_VERSION,
    TRAINER_STATE,
    write_metadata,
)
from mft_lightning.training.checkpoint_reading import read_state
from mft_lightning.training.loadable import REFUSALS, check_states, of_callback
from mft_lightning.training.shards import (
    ShardWriter,
    split_off,
    staged,
)

CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)  # what a full disk is to Python, to torch, to safetensors


@dataclass(frozen=True)
class SaveOptions:
    """How one checkpoint is saved.

    Args:
        epoch_end: it is kept for being an epoch's end.
        metrics: of the validation at its step.
        background: what writes it while training goes on; None writes it before returning.
        afterwards: called when it is in place, by whoever wrote it.
    """

    epoch_end: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    background: Background | None = None
    afterwards: Callable[[], None] = lambda: None


class HFCheckpointIO(CheckpointIO):
    """Writes and reads checkpoint directories for one module.

    A directory holds the model as ``from_pretrained`` (or ``PeftModel.from_pretrained``) reads it, the tokenizer with
    its chat template, ``trainer.pt`` (everything else Lightning saves; loads with ``weights_only=True``), and
    ``checkpoint.json`` for the eye. Weights stand in it once.
    """

    def __init__(self, module: MFTModule) -> None:
        self.module = module
        self.shard_writer: ShardWriter | None = None  # of a run whose ranks write their own parts
        self._preloaded: dict[Path, dict[str, Any]] = {}
        self._write_model: ModelWriter | None = None
        self._files: dict[str, bytes] = {}  # that are the same in every checkpoint
        self._described: dict[str, Any] = {}  # and what is the same in its description

    def preload(self, path: Path) -> dict[str, Any]:
        """Load a checkpoint ahead of the run, so that one that cannot be loaded stops it before anything is written.

        Returns:
            What :meth:`load_checkpoint` will give next; it may be changed until then.
        """
        self._preloaded[path] = self.load_checkpoint(path)
        return self._preloaded[path]

    def prepare(self) -> None:
        """Make what every checkpoint needs, once, on the thread that trains and before it does.

        transformers sets the default dtype of all threads for a moment when it makes a model, and asking the live model
        changes its generation config and its tokenizer for as long as it answers.
        """
        if self._write_model is not None:
            return
        built, network = self.module.built, self.module.network
        assert built is not None and network is not None
        self._write_model = ModelWriter(network.model, built.start.initial if built.start is not None else None)
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(self.module.datamodule.tokenizer, Path(folder))
            network.causal_lm.generation_config.save_pretrained(folder)
            self._files = {file.name: _compact(file) for file in Path(folder).iterdir()}
        datamodule = self.module.datamodule
        self._described = {
            "tasks": datamodule.task_names,
            "fingerprint": self.module.fingerprint(datamodule),
            "chat_format": {"normalize_punctuation": datamodule.chat_format.normalize_punctuation},
            "processes": self.module.trainer.world_size,
            "tensor_parallel": getattr(self.module.trainer.strategy, "sharing", 1),
            "versions": {
                "mft_lightning": mft_lightning.__version__,
                "torch": torch.__version__,
                "lightning": L.__version__,
                "transformers": transformers.__version__,
                "peft": version("peft"),
                **({} if self.module.quantization is None else {"bitsandbytes": version("bitsandbytes")}),
            },
        }

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: SaveOptions | None = None
    ) -> None:
        """Write ``checkpoint`` (Lightning's dictionary) as the directory ``path``; an existing one is replaced.

        Args:
            checkpoint: its ``state_dict`` goes to safetensors, the rest to ``trainer.pt``.
            path: the new directory.
            storage_options: what else is known of it, and whether to write it beside the training. Default: at once.

        Raises:
            UserError: it cannot be written. What was there before is as it was.
        """
        options = storage_options or SaveOptions()
        self.prepare()
        metadata = {
            "format": FORMAT_VERSION,
            "step": checkpoint["global_step"],
            "epoch": checkpoint["epoch"],
            "epoch_end": options.epoch_end,
            "metrics": options.metrics,
            **self._described,
        }
        if self.shard_writer is not None:
            small, weights, moments = split_off(checkpoint)
            named = {self._place(name): value for name, value in weights.items()}
            parts = {MODEL_SHARDS: staged(named), OPTIMIZER_SHARDS: staged(moments)}
            work = partial(self._write_parts, _copied(small), parts, Path(path), metadata, options)
            work() if options.background is None else options.background.start(work)
        elif options.background is None:
            self._write(checkpoint, Path(path), metadata, options)
        else:
            copied = _in_own_memory(checkpoint, gathered=getattr(self.module.trainer.strategy, "gathers", False))
            options.background.start(partial(self._write, copied, Path(path), metadata, options))

    def _write(self, checkpoint: dict[str, Any], path: Path, metadata: dict[str, Any], options: SaveOptions) -> None:
        assert self._write_model is not None
        state = {name.removeprefix(NETWORK): value for name, value in checkpoint["state_dict"].items()}
        try:
            with written_aside(path, replace_directory=True) as aside:
                aside.mkdir()
                self._write_model(state, aside)
                trainer_state = {key: value for key, value in checkpoint.items() if key != "state_dict"}
                self._write_rest(aside, trainer_state, metadata)
            options.afterwards()
        except CANNOT_WRITE as error:
            raise _cannot_write(path, error) from error

    def _write_parts(
        self,
        trainer_state: dict[str, Any],
        parts: dict[str, dict[str, torch.Tensor]],
        path: Path,
        metadata: dict[str, Any],
        options: SaveOptions,
    ) -> None:
        """Every rank its parts of the tensors, and the first all the rest."""
        assert self._write_model is not None and self.shard_writer is not None
        try:
            if not self.module.trainer.is_global_zero:
                self.shard_writer.meet()
                if not (aside := aside_of(path)).is_dir():  # which torch would make, on a host with other files
                    raise OSError(f"{aside} of the first rank is not seen on the host {socket.gethostname()}")
                self.shard_writer.write(aside, parts)
                return
            with written_aside(path, replace_directory=True) as aside:
                aside.mkdir()
                self.shard_writer.meet()
                self.shard_writer.write(aside, parts)
                self._write_model.describe(aside)
                self._write_rest(aside, trainer_state, metadata)
            options.afterwards()
        except CANNOT_WRITE as error:
            raise _cannot_write(path, error) from error

    def _write_rest(self, aside: Path, trainer_state: dict[str, Any], metadata: dict[str, Any]) -> None:
        for name, contents in self._files.items():
            (aside / name).write_bytes(contents)
        try:
            torch.save(trainer_state, aside / TRAINER_STATE)
            torch.load(aside / TRAINER_STATE, weights_only=True, mmap=True)
        except REFUSALS:
            callbacks = {of_callback(name): state for name, state in trainer_state["callbacks"].items()}
            check_states({**{key: value for key, value in trainer_state.items() if key != "callbacks"}, **callbacks})
            raise
        write_metadata(aside, metadata)

    def _place(self, name: str) -> str:
        assert self._write_model is not None
        return self._write_model.place(name.removeprefix(NETWORK))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Lightning's dictionary again; nothing is unpickled that ``weights_only`` would refuse.

        Without the trainer's state, where that was dropped: enough to measure the model, not to go on.
        """
        path = Path(path)
        if path in self._preloaded:
            return self._preloaded.pop(path)
        assert self.module.built is not None
        return read_state(path, self.module.built)

    def remove_checkpoint(self, path: str | Path) -> None:
        remove_directory(Path(path))


def _compact(file: Path) -> bytes:
    """A file's contents; of a fast tokenizer's in half the bytes, which are more than a small adapter's otherwise.

    Without the blanks that the library indents a vocabulary with, and a merge of "a" and "b" as "a b", which every
    version of it reads, where the pairs it writes are for parts with a blank in them.
    """
    if file.name != "tokenizer.json":
        return file.read_bytes()
    contents = json.loads(file.read_bytes())
    if (merges := contents["model"].get("merges")) and not any(" " in part for pair in merges for part in pair):
        contents["model"]["merges"] = [" ".join(pair) for pair in merges]
    return json.dumps(contents, ensure_ascii=False, separators=(",", ":")).encode()


def _cannot_write(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{shown(path)}: the checkpoint cannot be written ({first_line(error)}). Those before it are whole; free some "
        "space or mend the directory, then go on with --ckpt_path last."
    )


def _in_own_memory(checkpoint: dict[str, Any], *, gathered: bool) -> dict[str, Any]:
    """A checkpoint that training no longer changes: its tensors copied into host memory.

    Args:
        checkpoint: Lightning's dictionary.
        gathered: whether the strategy has put the weights and the optimizer's state into memory of their own already.
    """
    own = {"state_dict", "optimizer_states"} if gathered else set()
    return {key: value if key in own else _copied(value) for key, value in checkpoint.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value
