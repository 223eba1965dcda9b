"""Questions to a trainer: whether a step ends an epoch or the run, and which callbacks there are."""

from __future__ import annotations

from typing import TypeVar

import lightning as L

Kind = TypeVar("Kind", bound=L.Callback)


def is_epoch_end(trainer: L.Trainer) -> bool:
    """Whether the step just taken was the last of its epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def is_run_end(trainer: L.Trainer) -> bool:
    """Whether the step just taken is the run's last: by its limits, or because something asked it to stop."""
    if trainer.max_steps > -1 and trainer.global_step >= trainer.max_steps:
        return True
    limited = trainer.max_epochs is not None and trainer.max_epochs > -1
    if limited and is_epoch_end(trainer) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0):
        return True
    return trainer.should_stop


def find_callback(trainer: L.Trainer, kind: type[Kind]) -> Kind | None:
    """The trainer's first callback of a kind."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set in one of its connectors
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)
