"""What SIGTERM and Ctrl-C do in a run."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

import lightning as L

from mft_lightning import ranks


class GracefulStop(L.Callback):
    """Turns a SIGTERM or a Ctrl-C into an ordinary end: the step is finished, validated and saved.

    It listens in place of Lightning, which would break off in the middle of a validation, or between a step and its
    checkpoint. A second Ctrl-C does break off.

    Attributes:
        received: the signal that asked the run to stop, None so far.
    """

    received: signal.Signals | None = None

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.agree(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Asked after the last step: all ranks say so."""
        self.agree(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Asked during a validation: the step it belongs to is the last, and is saved."""
        if not trainer.sanity_checking:
            self.agree(trainer)

    def agree(self, trainer: L.Trainer) -> None:
        """All ranks stop if one of them is to, by whatever reason, and all know of a signal that one received."""
        found = ranks.highest(2 * (self.received or 0) + trainer.should_stop)
        if found > 1:  # else leave it alone: one may have come in the meantime
            self.received = signal.Signals(found // 2)
        trainer.should_stop = found > 0

    def _listen(self) -> None:
        signal.signal(signal.SIGTERM, self._receive)
        signal.signal(signal.SIGINT, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            if self.received is not None:
                raise KeyboardInterrupt
            if ranks.is_first():  # not by `print`, which may be what was interrupted
                os.write(sys.stderr.fileno(), b"\nending after this step, with a checkpoint; Ctrl-C again breaks off\n")
        self.received = signal.Signals(signum)


class EndAtOnce(L.Callback):
    """Ends a command that saves nothing as soon as SIGTERM comes; Lightning hears it only between two batches."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signal.signal(signal.SIGTERM, _end)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signal.signal(signal.SIGTERM, _end)


def _end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)
