"""When to validate. Lightning's own triggers are off: a validation runs at a step's end, before that step is saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import lightning as L
from lightning.pytorch.trainer import call

from mft_lightning.errors import UserError
from mft_lightning.training.stages import is_epoch_end, is_run_end
from mft_lightning.words import check_words

NEVER = 10**9  # epochs between Lightning's own validations, so that only this callback starts one


@dataclass(kw_only=True)
class EvaluationSettings:
    """When to validate, and on what.

    Args:
        strategy: "steps", "epoch", both ("steps,epoch"), or "none". A run also ends with a validation.
        steps: optimizer steps between validations, across epochs.
        at_start: validate before the first step too (step 0; not repeated on resume).
        max_conversations_per_task: at most so many of each task, drawn by the seed. Default: all.
        exclude_tasks: names of tasks that are trained on but not validated.
        exact_match_per_task: at the end, answer the prompts of so many held-out conversations of each task greedily,
            and count the answers that are the reference to the letter. Default: none.
        samples_per_task: at every validation, answer the prompts of so many held-out conversations of each task for
            TensorBoard's page of texts; 0 none. Default: 1, and none of more than 20 tasks.
    """

    strategy: Literal["steps", "epoch", "steps,epoch", "epoch,steps", "none"] = "steps"
    steps: int = 100
    at_start: bool = True
    max_conversations_per_task: int | None = None
    exclude_tasks: list[str] = field(default_factory=list)
    exact_match_per_task: int | None = None
    samples_per_task: int | None = None

    def __post_init__(self) -> None:
        check_words("evaluation", type(self), vars(self))
        for key in ("steps", "max_conversations_per_task", "exact_match_per_task"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"evaluation.{key}: {value} is less than 1.")
        if self.samples_per_task is not None and self.samples_per_task < 0:
            raise UserError(f"evaluation.samples_per_task: {self.samples_per_task} is less than 0.")

    @property
    def enabled(self) -> bool:
        return self.strategy != "none"

    def due(self, trainer: L.Trainer) -> bool:
        """Whether the step just taken is one to validate after."""
        by_steps = "steps" in self.strategy and trainer.global_step % self.steps == 0
        return by_steps or ("epoch" in self.strategy and is_epoch_end(trainer)) or is_run_end(trainer)


class Evaluation(L.Callback):
    """Runs the validation loop at the end of the steps that the settings name.

    Attributes:
        step: the optimizer step of the last validation, -1 before any.
        metrics: what it measured.
        before: what the validation before the first step measured; empty where there was none.
    """

    def __init__(self, settings: EvaluationSettings) -> None:
        self.settings = settings
        self.step = -1
        self.metrics: dict[str, float] = {}
        self.before: dict[str, float] = {}
        self._begun_at = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begun_at = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self.step != trainer.global_step and self.settings.due(trainer):
            _run_validation(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Asked to stop between two epochs: the step before is the last, as nobody knew when it ended."""
        if trainer.should_stop and trainer.global_step > self._begun_at:
            self.on_train_batch_end(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step = trainer.global_step
        self.metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if trainer.sanity_checking:
            self.before = self.metrics


def _run_validation(trainer: L.Trainer) -> None:
    """What Lightning's training loop does when a validation is due (``_TrainingEpochLoop.on_advance_end``)."""
    connector = trainer._logger_connector
    first_loop_iter = connector._first_loop_iter
    trainer.validating = True
    call._call_lightning_module_hook(trainer, "on_validation_model_zero_grad")
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_loop_iter
