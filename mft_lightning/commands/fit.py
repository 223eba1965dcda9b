"""``fit``: train, from a YAML file to checkpoints that resume."""

from __future__ import annotations

import math
import signal
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer

from mft_lightning import ranks
from mft_lightning.aside import written_aside
from mft_lightning.commands.going_on import load_resumed, resumed_checkpoint, settle
from mft_lightning.commands.introducing import introduction
from mft_lightning.commands.outcome import run_summary, task_results
from mft_lightning.commands.report import SKIPPED, run_plan
from mft_lightning.commands.step_memory import step_memory
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.errors import UserError, nearest
from mft_lightning.model.compiled import require_compiler
from mft_lightning.quiet import quieten
from mft_lightning.run_config import RunConfig
from mft_lightning.run_parser import DRY_RUN
from mft_lightning.screen import duration, json_line, say, shown
from mft_lightning.training.asking import Asking
from mft_lightning.training.balancing import check_balancing
from mft_lightning.training.checkpoint_choice import find_checkpoints
from mft_lightning.training.checkpoint_io import HFCheckpointIO
from mft_lightning.training.evaluation import Evaluation
from mft_lightning.training.launcher import LaunchedStrategy
from mft_lightning.training.own_classes import tell_loggers
from mft_lightning.training.questions import check_questions, samples_per_task
from mft_lightning.training.run import Run
from mft_lightning.training.run_lock import only_run_in
from mft_lightning.training.same_files import check_same_files
from mft_lightning.training.same_run import changed_layout, check_start
from mft_lightning.training.signals import GracefulStop
from mft_lightning.training.stages import find_callback
from mft_lightning.training.trainer import fit_trainer, shows_samples


class WriteConfig(L.Callback):
    """When training starts: writes the keys to ``config.yaml``, tells them, writes bad records to ``skipped.jsonl``."""

    def __init__(self, config: Run) -> None:
        self.config = config

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.config.output_dir.mkdir(parents=True, exist_ok=True)
            self.config.save(self.config.output_dir / "config.yaml")
            tell_loggers(trainer, self.config.keys)
            _write_skipped(self.config.datamodule, self.config.output_dir / SKIPPED)


def _write_skipped(datamodule: MFTDataModule, file: Path) -> None:
    """Every bad record that was skipped, a JSON line each; no file where there is none."""
    file.unlink(missing_ok=True)
    if not any(report.bad for corpus in datamodule.corpora for report in corpus.reports):
        return
    with written_aside(file) as aside, aside.open("w", encoding="utf-8") as handle:
        for corpus in datamodule.corpora:
            handle.writelines(f"{json_line(record)}\n" for record in corpus.skipped())


def fit(argv: list[str]) -> None:
    """Check everything that can be wrong first, then train; nothing is written before."""
    quieten()
    options = {DRY_RUN: {"action": "store_true", "help": "Check all up to the first step."}}
    config = RunConfig(argv, "fit", options)
    with config.placing():
        _, received = train(config)
    if received is not None:
        raise SystemExit(128 + received)


def train(config: Run) -> tuple[L.Trainer | None, signal.Signals | None]:
    """Train a run, alone in its output directory, or only check it.

    Returns:
        The Trainer, None where there was nothing to do; and the signal that ended it, if one did.
    """
    _check_writable(config.output_dir, "output_dir")
    _check_writable(config.tensorboard_dir, "tensorboard_dir")
    with only_run_in(config.output_dir) if ranks.is_first() else nullcontext():
        return _train(config)


def _train(config: Run) -> tuple[L.Trainer | None, signal.Signals | None]:
    keys, module, datamodule, settings = config.trainer_config, config.model, config.datamodule, config.settings
    resumed = resumed_checkpoint(config)
    module.check(datamodule, config.settings.parallel.tensor_parallel_size)
    if settings.checkpoint.sharded and module.lora.changes_base:
        raise UserError(
            f"checkpoint.sharded: has no place for what adapters begin with under model.lora.init: {module.lora.init}. "
            "Leave it out; adapters are small."
        )
    with ranks.first_before_others("data"):
        datamodule.setup("fit")
    _check_evaluation(config, datamodule)
    module.build(datamodule, random_base=str(config.output_dir / "base"), sketched=config.sharded)
    check_balancing(module, datamodule)
    checkpoint_io = HFCheckpointIO(module)
    notes = (
        load_resumed(checkpoint_io, resumed.path, config)
        if resumed is not None
        else check_start(module, datamodule.role_tokens)
    )
    total_steps = datamodule.plan.total_steps(keys["max_epochs"], keys["max_steps"])
    if resumed is not None and resumed.step >= total_steps:
        _agree(config, resumed.step)
        if ranks.is_first() and not config.dry_run:
            settle(config, resumed)
        print(
            f"nothing to do: {resumed.path.name} is at the end, raise trainer.max_steps or trainer.max_epochs to go on"
        )
        return None, None
    stop = GracefulStop()
    trainer = fit_trainer(
        keys,
        settings,
        checkpoint_io,
        seed=config.seed,
        output_dir=config.output_dir,
        tensorboard_dir=config.tensorboard_dir,
        introduction=partial(introduction, config),
        total_steps=total_steps,
        resumed_step=resumed.step if resumed else 0,
        samples_per_task=samples_per_task(settings.evaluation, datamodule) if settings.evaluation.enabled else 0,
        extra_callbacks=[stop, WriteConfig(config)],
    )
    if isinstance(trainer.strategy, LaunchedStrategy):
        begun, sharded = resumed.step if resumed else 0, settings.checkpoint.sharded
        trainer.strategy.check_together = partial(check_same_files, config.output_dir, begun, sharded=sharded)
    if module.compile_layers:
        require_compiler(trainer.strategy.root_device)
    memory, too_much = _memory(trainer, config)
    plan = run_plan(
        trainer,
        module,
        datamodule,
        total_steps=total_steps,
        memory=memory,
        output_dir=config.output_dir,
        resumed=resumed,
    )
    if resumed is not None:
        notes += changed_layout(resumed.path, trainer.world_size, config.settings.parallel.tensor_parallel_size)
    notes += datamodule.notes
    if settings.evaluation.samples_per_task and not shows_samples(keys):
        notes.append("note: evaluation.samples_per_task: trainer.logger: false shows no samples; none are asked.")
    if too_much and not config.dry_run:
        notes.append(f"note: {too_much}")
    say(*plan, *notes)
    if config.dry_run:
        _agree(config, resumed.step if resumed else 0)
        next(iter(datamodule.train_dataloader()))
        if too_much:
            raise UserError(too_much)
        say("", f"dry run: a run can start so. Nothing was trained, or written to {shown(config.output_dir)}.")
        return None, None
    start = time.perf_counter()
    trainer.fit(module, datamodule=datamodule, ckpt_path=resumed.path if resumed else None, weights_only=True)
    if ranks.is_first():
        _tell_outcome(config, trainer, total_steps, time.perf_counter() - start)
    if stop.received is not None:
        say(
            f"stopped by {stop.received.name}{'' if trainer.global_step < total_steps else ' when all steps were done'}"
        )
    return trainer, stop.received


def _agree(config: Run, step: int) -> None:
    """What ranks do together before they train, where a rank does not train; those of a launcher have met already."""
    if ranks.are_several():
        ranks.wait_for_all("checked")
        check_same_files(config.output_dir, step, sharded=False)


def _memory(trainer: L.Trainer, config: Run) -> tuple[str, str]:
    """What the steps need, or why that is not known; and, where that is more than there is, that and what to do."""
    try:
        found = step_memory(trainer, config)
    except UserError as error:  # a kind of model or strategy that cannot be counted
        return f"not known: {error}", ""
    return str(found), "" if found.fits else f"memory: {found.warning}"


def _tell_outcome(config: Run, trainer: L.Trainer, total_steps: int, seconds: float) -> None:
    """The table of the last validation, the checkpoints, and the commands to go on with."""
    datamodule, step = config.datamodule, trainer.global_step
    epochs = step / datamodule.plan.steps_per_epoch
    say("", f"trained to step {step:,} of {total_steps:,} ({epochs:.1f} epochs) in {duration(seconds)}")
    go_on = []
    stopping, clock = find_callback(trainer, EarlyStopping), find_callback(trainer, Timer)
    if stopping is not None and stopping.wait_count >= stopping.patience:
        least = f" by more than {abs(stopping.min_delta)}" if stopping.min_delta else ""
        say(f"stopped early: {stopping.monitor} has not improved{least} for {stopping.patience} validation(s)")
        go_on.append(f"--early_stopping.patience {2 * stopping.patience}")
    if clock is not None and (clock.time_remaining() or 0) <= 0:
        say("stopped by the clock: trainer.max_time is over")
        go_on.append("--trainer.max_time null")
    keys = config.trainer_config
    go_on += _twice_as_long(keys, step, datamodule.plan.steps_per_epoch) if step >= total_steps else []
    evaluation, asking = find_callback(trainer, Evaluation), find_callback(trainer, Asking)
    if evaluation is not None and (metrics := _validated(config, evaluation, step)):
        exact = asking.counts if asking is not None else None
        results = task_results(datamodule, "valid", metrics, before=evaluation.before, exact=exact)
        say("", f"validation at step {step:,}", results)
    say("", *run_summary(config.output_dir, config.tensorboard_dir, config.settings.checkpoint, " ".join(go_on)))


def _validated(config: Run, evaluation: Evaluation, step: int) -> dict[str, float]:
    """What the validation at the last step measured: in this run or, if it took no step, in the one it resumed."""
    if evaluation.step == step:
        return evaluation.metrics
    return next((info.metrics for info in find_checkpoints(config.output_dir) if info.step == step), {})


def _twice_as_long(keys: dict[str, Any], step: int, steps_per_epoch: int) -> list[str]:
    """The limits to raise so that a run that is done takes as many steps again."""
    words = []
    if 0 < keys["max_steps"] < 2 * step:
        words.append(f"--trainer.max_steps {2 * step}")
    if keys["max_epochs"] is not None and 0 < keys["max_epochs"] * steps_per_epoch < 2 * step:
        words.append(f"--trainer.max_epochs {math.ceil(2 * step / steps_per_epoch)}")
    return words


def _check_evaluation(config: Run, datamodule: MFTDataModule) -> None:
    """What validation is asked for must be possible."""
    settings = config.settings
    monitor = settings.checkpoint.monitor
    check_questions(settings.evaluation, datamodule)
    if not settings.evaluation.enabled:
        for key in ("exact_match_per_task", "samples_per_task"):
            if getattr(settings.evaluation, key):
                raise UserError(f"evaluation.{key}: needs validations, but evaluation.strategy is none.")
        if settings.early_stopping.patience != -1 or monitor != "val/loss":
            key = "checkpoint.monitor" if monitor != "val/loss" else "early_stopping.patience"
            raise UserError(f"{key}: needs validations, but evaluation.strategy is none.")
        return
    datamodule.check_evaluation("valid", in_training=True)
    evaluated = [name for name in datamodule.task_names if name not in datamodule.exclude_tasks]
    each = [f"val/{kind}/{name}" for kind in ("loss", "perplexity", "accuracy") for name in evaluated]
    known = ["val/loss", *each]
    if monitor not in known:
        raise UserError(f"checkpoint.monitor: {monitor!r} is none of {', '.join(known)}.{nearest(monitor, known)}")


def _check_writable(directory: Path, key: str) -> None:
    """Try it with a file that no one sees, in the directory or in the first one above it that is there."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(f"{key}: {directory} cannot be written ({existing}: {error.strerror}).") from error
