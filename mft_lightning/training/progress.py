"""The progress bar of a whole run, and how long the run has left."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, Timer
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text
from torch import Tensor

from mft_lightning.model.module import MFTModule
from mft_lightning.screen import console, duration
from mft_lightning.training.task_losses import in_a_line, of_tasks

LINES = 2  # of losses below the bars
WIDE_ENOUGH = 80  # columns of a terminal that has room for the bar beside its numbers


class Pace:
    """Time a run has left, from the mean time of its steps so far, validations and saves among them.

    Args:
        total_steps: the run's last step.
        timer: of ``trainer.max_time``, which may end the run before.
    """

    def __init__(self, total_steps: int, timer: Timer | None = None) -> None:
        self.total_steps, self.timer = total_steps, timer
        self._first: tuple[int, float] | None = None

    def left(self, step: int) -> str:
        """At ``step``, like ``1:05``; empty at the first step that is asked about, which there is nothing to go by."""
        now = time.perf_counter()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return ""
        first, since = self._first
        left = (now - since) / (step - first) * (self.total_steps - step)
        limit = self.timer.time_remaining() if self.timer is not None else None
        return duration(left if limit is None else max(0.0, min(left, limit)))


class _Bars(Progress):
    """Bars, and below them the losses of tasks, as many as there is room for."""

    losses: Mapping[str, float] = {}  # replaced, never written

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        # without losses it is drawn before there is a console
        if self.losses and (said := in_a_line(self.losses, LINES * self.console.width)):
            yield Text(said)


class RunBar(ProgressBar):
    """One bar over all optimizer steps of a run, with losses, tokens/s and time left, and one for each validation.

    Lightning's own bars go over an epoch (https://github.com/Lightning-AI/pytorch-lightning/issues/20862).
    What is printed while it is shown comes to stand above it.
    """

    def __init__(self, total_steps: int = 0, pace: Pace | None = None) -> None:
        super().__init__()
        self.total_steps, self.pace = total_steps, pace or Pace(total_steps)
        self._enabled = True
        self._progress: _Bars | None = None
        self._run: TaskID | None = None
        self._part: TaskID | None = None
        self._told: dict[str, Tensor] = {}  # metrics as they were when the losses below the bar were new

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    # ---------------------------------------------------------------- the run

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        self._run = self._add("step", self.total_steps, completed=step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._show_step(trainer, cast(MFTModule, pl_module).datamodule.task_names)

    def _show_step(self, trainer: L.Trainer, tasks: Sequence[str]) -> None:
        if self._progress is None or self._run is None:
            return
        step, parts = trainer.global_step, []
        metrics = trainer.callback_metrics
        if "train/loss" in metrics:
            parts.append(f"loss {float(metrics['train/loss']):.4f}")
            parts.append(f"{float(metrics['train/tokens_per_second']):,.0f} tokens/s")
            if metrics["train/loss"] is not self._told.get("train/loss"):  # another step was logged
                fresh = {name: value for name, value in metrics.items() if value is not self._told.get(name)}
                losses = of_tasks(fresh, "train/loss")
                self._progress.losses = {task: losses[task] for task in tasks if task in losses}
                self._told = dict(metrics)
        if left := self.pace.left(step):
            parts.append(f"{left} left")
        self._progress.update(self._run, completed=step, said="  ".join(parts))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    # ---------------------------------------------------------------- validations and tests

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            self.start_part("validating before the first step", trainer.num_sanity_val_batches)
            return
        self._show_step(trainer, cast(MFTModule, pl_module).datamodule.task_names)  # whose end is yet to come
        self.start_part("validating", trainer.num_val_batches)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.advance_part()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end_part()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start_part("testing", trainer.num_test_batches)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.advance_part()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end_part()

    # ---------------------------------------------------------------- ends

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def _add(self, description: str, total: float | None, completed: int = 0) -> TaskID | None:
        if not self._enabled:
            return None
        if self._progress is None:
            screen = console()
            bar = [BarColumn(24)] if screen.width >= WIDE_ENOUGH else []
            numbers, said = TextColumn("{task.completed:.0f}/{task.total:.0f}"), TextColumn("{task.fields[said]}")
            columns = (TextColumn("{task.description}"), *bar, numbers, said)
            # else a file that standard error was sent to would miss the warnings
            self._progress = _Bars(*columns, console=screen, redirect_stderr=sys.stderr.isatty())
            self._progress.start()
        return self._progress.add_task(description, total=total, completed=completed, said="")

    def start_part(self, description: str, batches: Sequence[float] | float) -> None:
        """A bar for something within the run, in place of the one before."""
        self.end_part()
        total = sum(batches) if isinstance(batches, Sequence) else batches
        self._part = self._add(description, total if math.isfinite(total) else None)

    def advance_part(self) -> None:
        if self._progress is not None and self._part is not None:
            self._progress.advance(self._part)

    def end_part(self) -> None:
        if self._progress is not None and self._part is not None:
            self._progress.remove_task(self._part)
            self._part = None

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._run = self._part = None
