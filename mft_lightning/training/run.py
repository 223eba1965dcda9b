"""What is to be known of a run, whoever asks for it: a YAML file and a command line, or Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.model.module import MFTModule
from mft_lightning.training.trainer import RunSettings


class Run(Protocol):
    """The objects of a run and its settings."""

    @property
    def model(self) -> MFTModule: ...

    @property
    def datamodule(self) -> MFTDataModule: ...

    @property
    def settings(self) -> RunSettings: ...

    @property
    def trainer_config(self) -> dict[str, Any]:
        """The Trainer keys, with the devices and the strategy of this run."""

    @property
    def seed(self) -> int: ...

    @property
    def ckpt_path(self) -> str | None:
        """``last``, ``best``, a checkpoint's directory, or None to begin anew."""

    @property
    def dry_run(self) -> bool:
        """Whether all is checked up to the first step, and nothing trained or written."""

    @property
    def output_dir(self) -> Path: ...

    @property
    def tensorboard_dir(self) -> Path: ...

    @property
    def sharded(self) -> bool:
        """Whether the strategy completes and shards a sketch of the network."""

    @property
    def keys(self) -> dict[str, Any]:
        """What loggers of the user's are told of it."""

    def save(self, file: Path) -> None:
        """Write what it can be run again from, if that can be written."""
