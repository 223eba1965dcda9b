"""Runs from Python: the Trainer for a notebook or a script, which does what ``fit``, ``validate`` and ``test`` do."""

from __future__ import annotations

import inspect
import os
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from transformers.utils import logging as transformers_logging

from mft_lightning import ranks
from mft_lightning.commands.evaluate import measure
from mft_lightning.commands.fit import train
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.errors import UserError
from mft_lightning.model.module import MFTModule
from mft_lightning.model.parallel import ParallelSettings
from mft_lightning.paths import given_path
from mft_lightning.quiet import quieten
from mft_lightning.run_config import TRAINER_DEFAULTS
from mft_lightning.training.callbacks import EarlyStoppingSettings
from mft_lightning.training.checkpoint import CheckpointSettings
from mft_lightning.training.checkpoint_choice import find_best, find_checkpoints, resolve_checkpoint
from mft_lightning.training.checkpoint_reading import read_state
from mft_lightning.training.evaluation import EvaluationSettings
from mft_lightning.training.shared_settings import SEED, share_settings
from mft_lightning.training.trainer import RunSettings, check_pages, check_trainer_keys, placed, weights_dtype
from mft_lightning.words import check_words

Checkpoint = Literal["last", "best"] | str | Path


class Trainer:
    """Trains and measures a :class:`MFTModule` on an :class:`MFTDataModule`, on one device, as the commands do.

    The same settings in YAML give the same weights and losses, to the bit. Each call makes a Trainer of Lightning's,
    with the callbacks of a run.

    Args:
        output_dir: everything a run writes.
        tensorboard_dir: TensorBoard's files. Default: output_dir/runs.
        seed: of the run; of data and model too, which must not have been given another one.
        max_steps: optimizer steps of the whole run; -1 leaves the end to max_epochs.
        max_epochs: passes over the training data.
        max_time: the longest the run may take, as ``DD:HH:MM:SS``.
        precision: 32-true, bf16-mixed, bf16-true, or 16-mixed on CUDA; weights and products follow it.
        accelerator: cpu, gpu, or auto.
        gradient_clip_val: most the global norm of a gradient may be.
        log_every_n_steps: optimizer steps between two that are logged.
        callbacks: your own, beside those of a run.
        logger: your own, beside TensorBoard's files and ``metrics.csv``; False for none at all.
        enable_progress_bar: Default: where the screen is a terminal.
        profiler: one of Lightning's, or its short name.
        deterministic: refuse operations whose results differ from call to call.
        detect_anomaly: stop at the operation whose gradient is no number.
        evaluation: when to validate, and on what.
        checkpoint: when to save, and what to keep.
        early_stopping: when to stop because validations no longer improve.

    Attributes:
        metrics: the latest of each that was logged, by name.

    Raises:
        UserError: from here or from any method: what is wrong, and what to do. Settings are named as in YAML.
    """

    def __init__(
        self,
        output_dir: str | Path = "checkpoints/run",
        *,
        tensorboard_dir: str | Path | None = None,
        seed: int = SEED,
        max_steps: int = -1,
        max_epochs: int | None = None,
        max_time: str | None = None,
        precision: str = "32-true",
        accelerator: str = "auto",
        gradient_clip_val: float | None = 1.0,
        log_every_n_steps: int = 10,
        callbacks: L.Callback | list[L.Callback] | None = None,
        logger: Logger | list[Logger] | bool | None = None,
        enable_progress_bar: bool | None = None,
        profiler: Profiler | str | None = None,
        deterministic: bool | Literal["warn"] | None = None,
        detect_anomaly: bool = False,
        evaluation: EvaluationSettings | None = None,
        checkpoint: CheckpointSettings | None = None,
        early_stopping: EarlyStoppingSettings | None = None,
    ) -> None:
        check_words("trainer", Trainer.__init__, locals())
        self.output_dir = given_path(output_dir, "output_dir:").absolute()
        given = given_path(tensorboard_dir, "tensorboard_dir:") if tensorboard_dir is not None else None
        self.tensorboard_dir = given.absolute() if given is not None else self.output_dir / "runs"
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise UserError(f"seed: {seed} is no number from 0 to 2^32 - 1; a run is made again from it.")
        self.seed = seed
        self.settings = RunSettings(
            evaluation=evaluation or EvaluationSettings(),
            checkpoint=checkpoint or CheckpointSettings(),
            early_stopping=early_stopping or EarlyStoppingSettings(),
            parallel=ParallelSettings(),
        )
        if self.settings.checkpoint.sharded:
            raise UserError("checkpoint.sharded: is for several devices. Leave it out.")
        given_keys = {
            "max_steps": max_steps,
            "max_epochs": max_epochs,
            "max_time": max_time,
            "precision": precision,
            "accelerator": accelerator,
            "gradient_clip_val": gradient_clip_val,
            "log_every_n_steps": log_every_n_steps,
            "callbacks": callbacks,
            "logger": logger,
            "enable_progress_bar": enable_progress_bar,
            "profiler": profiler,
            "deterministic": deterministic,
            "detect_anomaly": detect_anomaly,
            "devices": 1,
        }
        self.keys = {**_lightning_defaults(), **TRAINER_DEFAULTS, **given_keys}
        check_trainer_keys(self.keys)
        weights_dtype(precision)  # which refuses one that there is none of
        _check_kinds("callbacks", self.keys, L.Callback)
        _check_kinds("logger", self.keys, Logger)
        self.metrics: dict[str, float] = {}

    def fit(self, model: MFTModule, datamodule: MFTDataModule, *, ckpt_path: Checkpoint | None = None) -> None:
        """Train, from the start or from a checkpoint on, and say what a run says.

        Args:
            model: a new one, unless a checkpoint is loaded into it.
            datamodule: may serve several calls.
            ckpt_path: ``last``, ``best`` or a directory.

        Raises:
            SystemExit: SIGTERM or SIGUSR1 ended the run, which was saved.
            KeyboardInterrupt: a second Ctrl-C; after the first one the run was saved, and the call returns.
        """
        with _in_this_process():
            run = self._run(model, datamodule, ckpt_path)
            if ckpt_path is None and model.built is not None:
                raise UserError("model: was built before. Make a new MFTModule for a new run, or give ckpt_path.")
            trainer, received = train(run)
        if trainer is None:
            self._take(model, str(ckpt_path))
        else:
            self._remember({name: float(value) for name, value in trainer.callback_metrics.items()})
        if received not in (None, signal.SIGINT):  # who interrupts a cell goes on; who ends the process means all of it
            raise SystemExit(128 + received)

    def validate(
        self, model: MFTModule, datamodule: MFTDataModule, *, ckpt_path: Checkpoint | None = None
    ) -> dict[str, float]:
        """Measure a checkpoint (or, without one, the model as it is) on the validation split; by name."""
        return self._measure("validate", "valid", model, datamodule, ckpt_path)

    def test(
        self, model: MFTModule, datamodule: MFTDataModule, *, ckpt_path: Checkpoint | None = None
    ) -> dict[str, float]:
        """The same on the test split."""
        return self._measure("test", "test", model, datamodule, ckpt_path)

    @property
    def last_model_path(self) -> Path | None:
        """The latest checkpoint in ``output_dir``: a directory that ``from_pretrained`` reads."""
        found = find_checkpoints(self.output_dir)
        return found[-1].path if found else None

    @property
    def best_model_path(self) -> Path | None:
        """The best one by ``checkpoint.monitor``."""
        settings = self.settings.checkpoint
        best = find_best(find_checkpoints(self.output_dir), settings.monitor, settings.mode)
        return best.path if best is not None else None

    def _measure(
        self, command: str, split: str, model: MFTModule, data: MFTDataModule, ckpt_path: Checkpoint | None
    ) -> dict[str, float]:
        with _in_this_process():
            return self._remember(measure(self._run(model, data, ckpt_path), command, split))

    def _take(self, model: MFTModule, ckpt_path: str) -> None:
        """Give the model, which is built, the weights of a run that is at its end, and its metrics to this."""
        settings = self.settings.checkpoint
        checkpoint = resolve_checkpoint(ckpt_path, self.output_dir, settings.monitor, settings.mode, to_resume=True)
        assert checkpoint is not None and model.built is not None
        weights = read_state(checkpoint.path, model.built)["state_dict"]
        model.load_state_dict(weights, strict=model.strict_loading)
        self._remember(checkpoint.metrics)

    def _remember(self, metrics: dict[str, float]) -> dict[str, float]:
        self.metrics.update(metrics)
        return metrics

    def _run(self, model: MFTModule, datamodule: MFTDataModule, ckpt_path: Checkpoint | None) -> NotebookRun:
        if not (isinstance(model, MFTModule) and isinstance(datamodule, MFTDataModule)):
            given = f"{type(model).__name__} and {type(datamodule).__name__}"
            raise UserError(
                f"mft_lightning.Trainer: takes an MFTModule and an MFTDataModule, in this order, not {given}."
            )
        share_settings(
            model, datamodule, precision=self.keys["precision"], seed=self.seed, evaluation=self.settings.evaluation
        )
        if model.optim.kind == "paged_adamw":
            check_pages(self.keys["accelerator"])
        return NotebookRun(
            model=model,
            datamodule=datamodule,
            settings=self.settings,
            trainer_config=placed(self.keys, self.settings, undivided=model.undivided),
            seed=self.seed,
            ckpt_path=str(ckpt_path) if ckpt_path is not None else None,
            output_dir=self.output_dir,
            tensorboard_dir=self.tensorboard_dir,
        )


@dataclass(frozen=True)
class NotebookRun:
    """A run that Python describes; see :class:`~mft_lightning.training.run.Run`."""

    model: MFTModule
    datamodule: MFTDataModule
    settings: RunSettings
    trainer_config: dict[str, Any]
    seed: int
    ckpt_path: str | None
    output_dir: Path
    tensorboard_dir: Path
    sharded: bool = False
    dry_run: bool = False

    @property
    def keys(self) -> dict[str, Any]:
        plain = {name: value for name, value in self.trainer_config.items() if isinstance(value, str | int | float)}
        groups = {name: asdict(getattr(self.settings, name)) for name in ("evaluation", "checkpoint", "early_stopping")}
        facts = self.model.fingerprint(self.datamodule)
        return {"seed_everything": self.seed, "trainer": plain, **groups, "run": facts}

    def save(self, file: Path) -> None:
        """Nothing: what made the objects is the user's own code."""


def _lightning_defaults() -> dict[str, Any]:
    return {
        name: key.default for name, key in inspect.signature(L.Trainer.__init__).parameters.items() if name != "self"
    }


def _check_kinds(key: str, keys: Mapping[str, Any], kind: type) -> None:
    """Refuse what is no object of Lightning's kind, which would fail once training has begun."""
    given = keys[key]
    for one in given if isinstance(given, list) else [given]:
        if not (one is None or isinstance(one, kind | bool)):
            raise UserError(f"trainer.{key}: {one!r:.80} is no {kind.__name__} of Lightning's.")


@contextmanager
def _in_this_process() -> Iterator[None]:
    """Quiet while it lasts, and alone: several processes are for the command line, which starts and ends them together.

    Raises:
        UserError: a launcher started several.
    """
    if ranks.is_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("mft_lightning.Trainer: runs on one device. On several, use python -m mft_lightning fit.")
    before, bars = os.environ.get("TOKENIZERS_PARALLELISM"), transformers_logging.is_progress_bar_enabled()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warn at every fork of a loader's
    try:
        with warnings.catch_warnings():
            quieten()
            yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # of which Lightning makes the end of the process
            raise KeyboardInterrupt from None
        raise
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        if bars:
            transformers_logging.enable_progress_bar()
