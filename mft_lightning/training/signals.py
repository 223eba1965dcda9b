"""What SIGTERM, SIGUSR1 and Ctrl-C do in a run."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, ClassVar

import lightning as L

from mft_lightning import ranks

PATIENCE = 5.0  # seconds that a second Ctrl-C has to end the run in order
END = b"\0"  # no signal has this number
STDERR = 2  # every process's descriptor of it


class GracefulStop(L.Callback):
    """Turns a SIGTERM, a SIGUSR1 or a Ctrl-C into an ordinary end: the step is finished, validated and saved.

    SIGUSR1 is what SLURM is told to send some time before it takes a machine away (``--signal=USR1@120``).
    It listens in place of Lightning, which would break off in the middle of a validation, or between a step and its
    checkpoint. A second Ctrl-C does break off, even while this rank waits for one that hangs.

    Attributes:
        received: the signal that asked the run to stop, None so far.
    """

    received: signal.Signals | None = None
    _interrupts: Interrupts | None = None

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen(trainer)
        self.agree(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.agree(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.agree(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
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

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end_listening()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end_listening()

    def _listen(self, trainer: L.Trainer) -> None:
        if not _hears_signals():
            return
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(signum, self._receive)
        heard_before = trainer._signal_connector
        if heard_before.received_sigterm:  # by Lightning, which would end the run after a step, without saving it
            heard_before.received_sigterm = False
            self.received = self.received or signal.SIGTERM
        self._interrupts = self._interrupts or Interrupts()

    def _end_listening(self) -> None:
        if self._interrupts is not None:
            self._interrupts.end()
            self._interrupts = None

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(signum)


class Interrupts:
    """Hears Ctrl-C in a thread, because Python hears none while its main thread waits for another rank in C++.

    Says what the first one does, and ends the process after a second one that changes nothing.

    Attributes:
        heard: whether there is one at work in this process.
    """

    heard: ClassVar[bool] = False

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        Interrupts.heard = True
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._hear, daemon=True, name="hear Ctrl-C")
        self._thread.start()

    def end(self) -> None:
        """Hear no more."""
        signal.set_wakeup_fd(self._before)
        Interrupts.heard = False
        self._ended.set()
        os.write(self._writing, END)  # closing alone is no end where processes that were forked hold the pipe too
        self._thread.join()
        os.close(self._writing)
        os.close(self._reading)

    def _hear(self) -> None:
        said = False
        while (heard := os.read(self._reading, 1)) != END:
            if heard[0] != signal.SIGINT:
                continue
            if said and not self._ended.wait(PATIENCE):
                _say("error: interrupted.")
                os._exit(128 + signal.SIGINT)
            if not said:
                _say("\nending after this step, with a checkpoint; Ctrl-C again breaks off")
            said = True


def _leave_to_parent() -> None:
    """A forked worker of a loader would count the terminal's one Ctrl-C again."""
    if Interrupts.heard:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_to_parent)


def _hears_signals() -> bool:
    """Python lets the main thread alone hear them; a run from Python may be in another."""
    return threading.current_thread() is threading.main_thread()


def _say(line: str) -> None:
    """Not by `print`, which may be what was interrupted, nor to `sys.stderr`, which in a notebook is no file."""
    if ranks.is_first():
        os.write(STDERR, f"{line}\n".encode())


class EndAtOnce(L.Callback):
    """Ends a command that trains nothing as soon as SIGTERM comes; Lightning hears it only between two batches."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen()

    def _listen(self) -> None:  # the first rank names another one that was killed
        if _hears_signals():
            signal.signal(signal.SIGTERM, _end if ranks.is_first() else signal.SIG_DFL)


def _end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)
