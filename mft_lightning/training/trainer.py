"""The Trainer of a run: its callbacks, loggers and checkpoints, and the Trainer keys that have another home here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar, Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mft_lightning.documented import page
from mft_lightning.errors import UserError
from mft_lightning.model.parallel import ParallelSettings
from mft_lightning.refusals import refusal
from mft_lightning.screen import console
from mft_lightning.training.asking import Asking
from mft_lightning.training.balancing import Balancing
from mft_lightning.training.callbacks import EarlyStoppingSettings, EpochCount, RandomBase, StepLogging, StepSeeding
from mft_lightning.training.checkpoint import CheckpointSettings, HFModelCheckpoint
from mft_lightning.training.checkpoint_io import HFCheckpointIO
from mft_lightning.training.curves import Curves
from mft_lightning.training.evaluation import NEVER, Evaluation, EvaluationSettings
from mft_lightning.training.fsdp1 import FlatShardedStrategy
from mft_lightning.training.introduction import Introduction
from mft_lightning.training.layout import find_layout, slurm_task
from mft_lightning.training.loggers import MetricsCSV, PlainLines
from mft_lightning.training.own_classes import count_steps_taken, listed, own_callbacks, own_loggers
from mft_lightning.training.progress import Pace, RunBar
from mft_lightning.training.signals import EndAtOnce
from mft_lightning.training.skipped_steps import SKIPPED_STEPS, SkippedSteps
from mft_lightning.training.strategies import ShardedStrategy, make_strategy

WEIGHTS_DTYPE = {
    "32-true": "float32",
    "32": "float32",
    "64-true": "float64",
    "bf16-mixed": "float32",
    "bf16-true": "bfloat16",
    "16-mixed": "float32",
}

PROFILERS = ("simple", "advanced", "pytorch")

# Trainer keys that a run decides by itself: the value Lightning has, and where to say it here.
ELSEWHERE: dict[str, tuple[Any, str]] = {
    "accumulate_grad_batches": (1, "data.gradient_accumulation_steps"),
    "val_check_interval": (None, "evaluation.steps"),
    "check_val_every_n_epoch": (1, "evaluation.strategy"),
    "num_sanity_val_steps": (None, "evaluation.at_start"),
    "limit_train_batches": (None, "trainer.max_steps"),
    "limit_val_batches": (None, "evaluation.max_conversations_per_task"),
    "limit_test_batches": (None, "evaluation.max_conversations_per_task"),
    "limit_predict_batches": (None, "--limit of predict"),
    "overfit_batches": (0.0, "trainer.max_steps"),
    "fast_dev_run": (False, "trainer.max_steps"),
    "enable_checkpointing": (None, "checkpoint.checkpointing_steps"),
    "reload_dataloaders_every_n_epochs": (0, "nothing (the plan shuffles every epoch)"),
    "use_distributed_sampler": (True, "nothing (the plan deals to the ranks)"),
    "default_root_dir": (None, "output_dir"),
    "min_steps": (None, "early_stopping.patience"),
    "min_epochs": (None, "early_stopping.patience"),
    "barebones": (False, "trainer.logger"),
    "sync_batchnorm": (False, "nothing (the models here have no batch normalisation)"),
    "model_registry": (None, "output_dir, from which a checkpoint can be uploaded"),
}


@dataclass(kw_only=True)
class RunSettings:
    """The groups of keys that decide what a Trainer does, and the words that start a further rank of the run."""

    evaluation: EvaluationSettings
    checkpoint: CheckpointSettings
    early_stopping: EarlyStoppingSettings
    parallel: ParallelSettings
    command: Sequence[str] = ()


def weights_dtype(precision: Any) -> str:
    """The dtype weights are held in under ``trainer.precision``.

    Raises:
        UserError: a precision that training does not support.
    """
    if precision is None:
        return "float32"
    if str(precision) not in WEIGHTS_DTYPE:
        raise UserError(refusal("trainer.precision", precision, {"enum": list(WEIGHTS_DTYPE)}, page))
    return WEIGHTS_DTYPE[str(precision)]


def product_dtype(precision: Any) -> str:
    """The dtype matrix products are computed in under ``trainer.precision``."""
    if str(precision).endswith("-mixed"):
        return "bfloat16" if str(precision) == "bf16-mixed" else "float16"
    return weights_dtype(precision)


def check_trainer_keys(keys: dict[str, Any]) -> None:
    """Refuse Trainer keys that are set but have another home here, and what this version cannot do.

    Raises:
        UserError: naming the key, and where to say it or what it takes.
    """
    for key, (default, here) in ELSEWHERE.items():
        if keys.get(key, default) != default:
            raise UserError(f"trainer.{key}: {keys[key]} has no effect here. Use {here}. See {page(f'trainer.{key}')}.")
    for key, least in (("log_every_n_steps", 1), ("gradient_clip_val", 0), ("max_steps", 1), ("max_epochs", 1)):
        value = keys.get(key)
        if value is not None and not least <= value < math.inf and not (key.startswith("max_") and value == -1):
            raise UserError(f"trainer.{key}: {value} is no number from {least} on. See {page(f'trainer.{key}')}.")
    if keys.get("precision") == "16-mixed" and not torch.cuda.is_available():
        raise UserError(
            f"trainer.precision: 16-mixed needs a CUDA GPU. Use bf16-mixed. See {page('trainer.precision')}."
        )
    if keys.get("max_time") is not None:
        _timer(keys["max_time"])


def fit_trainer(
    keys: dict[str, Any],
    settings: RunSettings,
    checkpoint_io: HFCheckpointIO,
    *,
    seed: int,
    output_dir: Path,
    tensorboard_dir: Path,
    introduction: Callable[[], Introduction],
    resumed_step: int,
    total_steps: int,
    samples_per_task: int,
    extra_callbacks: list[L.Callback],
) -> L.Trainer:
    """The Trainer that trains.

    The order of callbacks matters: a step is logged, seen by the user's callbacks, moves the tasks' weights, is
    validated, and saved (Lightning puts checkpoints last); the clock comes before all, so that its last step is known
    to be the last.
    """
    evaluation = Evaluation(settings.evaluation) if settings.evaluation.enabled else None
    callbacks: list[L.Callback] = [StepSeeding(seed), EpochCount()]
    timer = _timer(keys["max_time"]) if keys.get("max_time") is not None else None
    callbacks += [timer] if timer is not None else []
    callbacks += extra_callbacks
    logs, skipped = keys.get("logger") is not False, SkippedSteps(output_dir / SKIPPED_STEPS)
    callbacks += [StepLogging(keys["log_every_n_steps"], skipped, measures_peak=logs), skipped]
    callbacks += own_callbacks(keys.get("callbacks"))
    callbacks.append(Balancing())
    if checkpoint_io.module.source.init == "random":
        callbacks.append(RandomBase(output_dir / "base", resumed=resumed_step > 0))
    if settings.early_stopping.patience != -1:
        callbacks.append(settings.early_stopping.callback(settings.checkpoint))
    if evaluation is not None:
        callbacks.append(evaluation)
    callbacks += _asking(settings, samples_per_task if shows_samples(keys) else 0)
    callbacks.append(HFModelCheckpoint(settings.checkpoint, output_dir, evaluation, checkpoint_io))
    bar, pace = _shows_bar(keys), Pace(total_steps, timer)
    callbacks += [RunBar(total_steps, pace)] if bar and not _own_bar(keys) else []
    loggers: list[Logger] = [PlainLines(total_steps, None if bar else pace)]
    if logs:
        curves = Curves(tensorboard_dir, resumed_step, introduction)
        loggers = [curves, MetricsCSV(output_dir / "metrics.csv", resumed_step), *loggers]
    loggers += own_loggers(keys.get("logger"))  # after the line on the screen, which none of them may cost
    trainer = _trainer(
        {
            **keys,
            "callbacks": callbacks,
            "logger": loggers,
            "plugins": [*listed(keys.get("plugins")), *slurm_task(), checkpoint_io],
            "max_time": None,
            "enable_progress_bar": bar,
            "default_root_dir": output_dir,
            "use_distributed_sampler": False,
            "check_val_every_n_epoch": NEVER,
            "limit_val_batches": 1.0 if evaluation else 0,
            # Lightning's sanity check over all batches is a validation before training, not repeated on resume
            "num_sanity_val_steps": -1 if settings.evaluation.at_start else 0,
        }
    )
    count_steps_taken(trainer)
    return trainer


def evaluation_trainer(
    keys: dict[str, Any],
    settings: RunSettings,
    checkpoint_io: HFCheckpointIO,
    output_dir: Path,
    extra_callbacks: Sequence[L.Callback] = (),
) -> L.Trainer:
    """The Trainer of ``validate``, ``test`` and ``predict``: by itself it writes nothing."""
    bar = _shows_bar(keys)
    callbacks = [EndAtOnce(), *listed(keys.get("callbacks")), *_asking(settings, 0), *extra_callbacks]
    callbacks += [RunBar()] if bar and not _own_bar(keys) else []
    return _trainer(
        {
            **keys,
            "callbacks": callbacks,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": bar,
            "plugins": [*listed(keys.get("plugins")), *slurm_task(), checkpoint_io],
            "default_root_dir": output_dir,
            "use_distributed_sampler": False,
        }
    )


def shows_samples(keys: dict[str, Any]) -> bool:
    """Whether there is somebody to answer prompts in training, and TensorBoard to show it."""
    return keys.get("logger") is not False and not isinstance(keys["strategy"], FlatShardedStrategy)


def _asking(settings: RunSettings, samples_per_task: int) -> list[L.Callback]:
    exact_per_task = settings.evaluation.exact_match_per_task or 0
    return [Asking(exact_per_task, samples_per_task)] if exact_per_task or samples_per_task else []


def _shows_bar(keys: dict[str, Any]) -> bool:
    """A bar where the screen is a terminal, plain lines elsewhere, unless ``trainer.enable_progress_bar`` says."""
    asked = keys.get("enable_progress_bar")
    return console().is_interactive or _own_bar(keys) if asked is None else bool(asked)


def _own_bar(keys: dict[str, Any]) -> bool:
    """Whether ``trainer.callbacks`` brings a progress bar; Lightning takes one."""
    return any(isinstance(callback, ProgressBar) for callback in listed(keys.get("callbacks")))


def check_pages(accelerator: Any) -> None:
    """Refuse paging where nothing is paged; bitsandbytes would do without it and say so once.

    Raises:
        UserError: the run has no CUDA GPU.
    """
    if accelerator == "cpu" or not torch.cuda.is_available():
        raise UserError(
            "model.optimizer: paged_adamw moves its state between a CUDA GPU and the host, and this run has no such "
            "GPU. Use adamw."
        )


def placed(keys: dict[str, Any], settings: RunSettings, *, undivided: str | None = None) -> dict[str, Any]:
    """The Trainer keys with the devices and the strategy of this run in place of what was asked for.

    Args:
        keys: of the Trainer.
        settings: the other groups of keys.
        undivided: the key, if any, whose tensors devices cannot share out.

    Raises:
        UserError: devices or a strategy that cannot be had.
    """
    layout, precision = find_layout(keys["accelerator"], keys["devices"], keys["num_nodes"]), str(keys["precision"])
    strategy = make_strategy(
        keys["strategy"],
        settings.parallel,
        layout=layout,
        precision=precision,
        undivided=undivided,
        command=settings.command,
    )
    keys = {**keys, "devices": layout.devices, "num_nodes": layout.nodes, "strategy": strategy}
    for key in ("exact_match_per_task", "samples_per_task"):
        if isinstance(strategy, FlatShardedStrategy) and getattr(settings.evaluation, key):
            raise UserError(f"evaluation.{key}: FSDPStrategy cannot answer prompts. Use trainer.strategy: fsdp.")
    if settings.checkpoint.sharded and not isinstance(strategy, ShardedStrategy):
        raise UserError("checkpoint.sharded: is for trainer.strategy: fsdp, which does not run here. Leave it out.")
    if isinstance(strategy, ShardedStrategy):
        keys["inference_mode"] = False  # weights that are first gathered under it cannot train afterwards
        if precision == "64-true":
            keys["precision"] = "32-true"  # which leaves everything as it is, the weights' float64 too
    return keys


def _timer(duration: Any) -> Timer:
    try:
        return Timer(duration)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(
            f"trainer.max_time: {duration!r} is no duration. Write it as '00:12:00:00', which is DD:HH:MM:SS. "
            f"See {page('trainer.max_time')}."
        ) from error


def _trainer(keys: dict[str, Any]) -> L.Trainer:
    if keys.get("profiler") == "pytorch":  # whose own default is to see all modules called: the head's loss calls none
        keys = {**keys, "profiler": PyTorchProfiler(record_module_names=False)}
    try:
        return L.Trainer(**keys)
    except (MisconfigurationException, ModuleNotFoundError, ValueError, RuntimeError) as error:
        raise UserError(f"trainer: {error}") from error  # a RuntimeError: two callbacks under one key of a checkpoint
