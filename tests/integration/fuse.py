"""A callback that ends its process by SIGKILL, some time after a place in the run that is told beforehand."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any, Literal

import lightning as L

Hook = Literal[
    "setup", "train_epoch_start", "train_batch_start", "validation_batch_start", "save_checkpoint", "train_epoch_end"
]


class Fuse(L.Callback):
    """Is lit in a hook, burns for a while, and then kills the process without a word to anyone else in it.

    It draws no random number and keeps no state in checkpoints, so a run with it is the run without it.

    Args:
        hook: where it is lit, the first time that ``step`` is reached there. Validations before training do not count.
        step: least number of optimizer steps that are done by then.
        delay: seconds that it burns.
        rank: of the process that is killed.
        note: a file that place and step of the kill are written to at the last moment. Places are "start", "step",
            "validation", "save", "epoch" and "end".
    """

    def __init__(self, hook: Hook, step: int, delay: float, rank: int, note: str) -> None:
        self.hook, self.step, self.delay, self.rank = hook, step, delay, rank
        self.note = Path(note)
        self.place, self.lit = "start", False

    def setup(self, trainer: L.Trainer, *args: Any, **named: Any) -> None:
        self._reach("setup", "start", trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._reach("train_epoch_start", "epoch", trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._reach("train_batch_start", "step", trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self._reach("validation_batch_start", "validation", trainer)

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.place = "step"

    def on_save_checkpoint(self, trainer: L.Trainer, *args: Any) -> None:
        self._reach("save_checkpoint", "save", trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._reach("train_epoch_end", "epoch", trainer)

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.place = "end"

    def _reach(self, hook: Hook, place: str, trainer: L.Trainer) -> None:
        self.place = place
        if self.lit or hook != self.hook or trainer.global_rank != self.rank or trainer.global_step < self.step:
            return
        self.lit = True
        timer = threading.Timer(self.delay, self._burn, [trainer])
        timer.daemon = True
        timer.start()

    def _burn(self, trainer: L.Trainer) -> None:
        """A save may go on beside the steps that follow; what it has not finished tells of it."""
        saving = any(Path(trainer.default_root_dir).glob(".step-*"))
        self.note.write_text(f"{'save' if saving else self.place} {trainer.global_step}")
        os.kill(os.getpid(), signal.SIGKILL)
