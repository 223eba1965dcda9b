"""Things that go wrong on one rank of several; ``trainer.callbacks`` brings them into a run."""

from __future__ import annotations

import os
import signal
import time
from typing import Literal

import lightning as L

from mft_lightning.errors import UserError


class Fault(L.Callback):
    """Goes wrong in one way, on one rank, before the first micro-batch of one step.

    Args:
        kind: an error of ours, one of Python, an end by a signal, a request to stop by one, or a long sleep.
        rank: where.
        step: optimizer steps that are done by then.
    """

    def __init__(
        self, kind: Literal["user", "python", "kill", "term", "sleep", "stop"], rank: int, step: int = 2
    ) -> None:
        self.kind, self.rank, self.step = kind, rank, step

    def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_rank != self.rank or trainer.global_step != self.step:
            return
        if self.kind == "user":
            raise UserError("a record is bad.")
        if self.kind == "python":
            raise ZeroDivisionError("by chance")
        if self.kind == "sleep":
            time.sleep(3600)
        if self.kind == "stop":
            trainer.should_stop = True
            return
        os.kill(os.getpid(), signal.SIGKILL if self.kind == "kill" else signal.SIGTERM)
