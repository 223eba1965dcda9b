"""Things that go wrong on one rank of several; ``trainer.callbacks`` brings them into a run."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger

from mft_lightning.data.collate import StepBatch
from mft_lightning.data.loader import TrainLoader, TrainSteps
from mft_lightning.errors import UserError
from mft_lightning.model.module import MFTModule
from mft_lightning.model.supervised_loss import SupervisedNLL
from mft_lightning.weighting.balancer import Balancer


class NotFinite(L.Callback):
    """The first conversation of a rank's step gets an infinite loss, or gradients that are no numbers.

    Args:
        what: which of the two.
        rank: where.
        steps: optimizer steps that are done by then.
    """

    def __init__(self, what: Literal["loss", "gradient"], rank: int, steps: list[int]) -> None:
        self.what, self.rank, self.steps = what, rank, steps

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: MFTModule, *args: object) -> None:
        if trainer.global_step not in self.steps or trainer.global_rank != self.rank:
            return
        handle = pl_module.network.register_forward_hook(lambda *given: self._spoil(given[-1], handle))

    def _spoil(self, output: SupervisedNLL, handle: torch.utils.hooks.RemovableHandle) -> SupervisedNLL:
        handle.remove()
        if self.what == "loss":
            first = torch.zeros_like(output.nll)
            first[0] = torch.inf
            return output._replace(nll=output.nll + first, loss=output.loss + torch.inf)
        output.loss.register_hook(lambda gradient: gradient * torch.nan)
        return output


class Fault(L.Callback):
    """Goes wrong in one way, on one rank, before the first micro-batch of one step or in a later hook.

    But not where torchrun has started the ranks again.

    Args:
        kind: an error of ours, one of Python, a signal, a request to stop, a long sleep or a short one, or SIGKILL for
            a process that loads data.
        rank: where; -1 is everywhere.
        step: optimizer steps that are done by then.
        hook: where, if not in training.
    """

    def __init__(
        self,
        kind: Literal["user", "python", "kill", "term", "interrupt", "sleep", "pause", "stop", "worker"],
        rank: int,
        step: int = 2,
        hook: Literal[
            "train_batch_start", "validation_start", "validation_end", "epoch_end", "train_end", "teardown"
        ] = "train_batch_start",
    ) -> None:
        self.kind, self.rank, self.step, self.hook = kind, rank, step, hook

    def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            self._happen(trainer, "train_batch_start")

    def on_train_epoch_end(self, trainer: L.Trainer, *args: object) -> None:
        self._happen(trainer, "epoch_end")

    def on_validation_start(self, trainer: L.Trainer, *args: object) -> None:
        self._happen(trainer, "validation_start")

    def on_validation_end(self, trainer: L.Trainer, *args: object) -> None:
        self._happen(trainer, "validation_end")

    def on_train_end(self, trainer: L.Trainer, *args: object) -> None:
        self._happen(trainer, "train_end")

    def teardown(self, trainer: L.Trainer, *args: object, **named: object) -> None:
        self._happen(trainer, "teardown")

    def _happen(self, trainer: L.Trainer, hook: str) -> None:
        if self.rank not in (-1, trainer.global_rank) or hook != self.hook:
            return
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            return
        if self.kind == "user":
            raise UserError("a record is bad.")
        if self.kind == "python":
            raise ZeroDivisionError("by chance")
        if self.kind == "sleep":
            time.sleep(3600)
        if self.kind == "pause":
            end = time.monotonic() + 10
            while time.monotonic() < end:  # a signal ends a sleep's wait, not this
                time.sleep(0.1)
            return
        if self.kind == "stop":
            trainer.should_stop = True
            return
        if self.kind == "worker":
            multiprocessing.active_children()[0].kill()
            return
        signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}
        os.kill(os.getpid(), signals[self.kind])


class BadRecord(L.Callback):
    """A rank cannot read its part of a step.

    Args:
        rank: which.
        step: optimizer steps that are done by then.
    """

    def __init__(self, rank: int, step: int = 2) -> None:
        self.rank, self.step = rank, step

    def setup(self, trainer: L.Trainer, pl_module: MFTModule, stage: str) -> None:
        datamodule = trainer.datamodule
        make = datamodule.train_dataloader

        def spoilt() -> TrainLoader:
            loader = make()
            if trainer.global_rank == self.rank:
                loader.dataset.__class__, loader.dataset.unreadable = Unreadable, self.step
            return loader

        datamodule.train_dataloader = spoilt


class Unreadable(TrainSteps):
    """Fails in the loader's process, if it has one."""

    def __getitem__(self, key: tuple[int, int]) -> StepBatch:
        if key[1] == self.unreadable:
            raise ZeroDivisionError("by chance")
        return super().__getitem__(key)


class Removal(L.Callback):
    """Someone removes a directory of the run after a step.

    Args:
        path: the directory.
        step: optimizer steps that are done by then.
    """

    def __init__(self, path: str, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            trainer.checkpoint_callback._background.wait()
            shutil.rmtree(self.path)


class LateWrites(L.Callback):
    """Checkpoints are written long after their copy was taken, while the weights move on.

    Args:
        seconds: how long.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: L.Trainer, *args: object) -> None:
        checkpoint_io = trainer.strategy.checkpoint_io
        checkpoint_io.prepare()
        write = checkpoint_io._write_model

        def late(*given: object) -> None:
            time.sleep(self.seconds)
            write(*given)

        checkpoint_io._write_model = late


class StateOfObjects(L.Callback):
    """A user's callback with a state that only unpickling of any code could load."""

    def state_dict(self) -> dict[str, object]:
        return {"best": np.float64(1)}


class LateState(L.Callback):
    """A user's callback that has a state once a run has begun.

    Args:
        writable: whether it can be written, though not loaded.
    """

    def __init__(self, writable: bool) -> None:
        self.writable = writable

    def on_train_start(self, trainer: L.Trainer, *args: object) -> None:
        self.state = {"seen": Path("data") if self.writable else threading.Lock()}

    def state_dict(self) -> dict[str, object]:
        return self.state


class EarlySignal(L.Callback):
    """SIGTERM before the first step.

    Args:
        hook: where.
    """

    def __init__(self, hook: Literal["train_start", "sanity_check_start"]) -> None:
        self.hook = hook

    def on_sanity_check_start(self, trainer: L.Trainer, *args: object) -> None:
        if self.hook == "sanity_check_start":
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_start(self, trainer: L.Trainer, *args: object) -> None:
        if self.hook == "train_start":
            os.kill(os.getpid(), signal.SIGTERM)


class DoubledWeights(Balancer):
    """A user's balancer that forgets that weights have a mean of 1."""

    def after_step(self, step: int, train: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        self.weights = 2 * self.weights

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class StateOfLocks(DoubledWeights):
    """A user's balancer with a state that nothing can write."""

    def state_dict(self) -> dict[str, Any]:
        return {"lock": threading.Lock()}


class Unfinished(Balancer):
    """A user's balancer that says nothing of its state."""

    def after_step(self, step: int, train: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Nothing."""


class Unprepared(DoubledWeights):
    """A user's balancer that leaves out what every balancer begins with."""

    def __init__(self, tasks: int) -> None:
        self.count = tasks


class DueNumber(DoubledWeights):
    """A user's balancer that says how many batches it wants to see, not which."""

    validates = True

    def batches_due(self, step: int) -> int:
        return step


class UnsaidDue(DoubledWeights):
    """A user's balancer that wants to see batches, and has not said so."""

    def batches_due(self, step: int) -> range:
        return range(1)


class ShortBalancer(DoubledWeights):
    """A user's balancer that leaves out what it does not look at."""

    def after_step(self, step: int, train: torch.Tensor) -> None:
        """Nothing."""


class ShortHook(L.Callback):
    """A user's callback that leaves out what it does not look at."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: MFTModule) -> None:
        """Nothing."""


class OtherSetup(L.Callback):
    """A user's callback that calls the stage something else; Lightning gives it by its name."""

    def setup(self, trainer: L.Trainer, pl_module: MFTModule, phase: str) -> None:
        """Nothing."""


class Unmade(L.Callback):
    """A user's callback with a mistake in its first line."""

    def __init__(self) -> None:
        raise KeyError("threshold")


class UnmadeOptimizer(torch.optim.SGD):
    """A user's optimizer with a mistake in its first line."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        raise RuntimeError("no such device")


class DeafOptimizer(torch.optim.SGD):
    """A user's optimizer that takes a closure and leaves it."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay=weight_decay)

    def step(self, closure: Any = None) -> None:
        super().step()


class OldOptimizer(DeafOptimizer):
    """A user's optimizer that takes no closure."""

    def step(self) -> None:
        super().step()


class Counting(L.Callback):
    """A user's callback with a state."""

    def state_dict(self) -> dict[str, int]:
        return {"steps": 1}


class Untyped:
    """What a user's class needs first, without a type as most write it."""

    def __init__(self, needed, more=3):
        self.needed = needed


class UntypedCallback(Untyped, L.Callback):
    """A user's callback."""


class UntypedLogger(CSVLogger):
    """A user's logger."""

    def __init__(self, needed, save_dir="losses"):
        super().__init__(save_dir)


class UntypedOptimizer(torch.optim.SGD):
    """A user's optimizer."""

    def __init__(self, params, lr, needed, weight_decay=0.0):
        super().__init__(params, lr, weight_decay=weight_decay)


class UntypedBalancer(DoubledWeights):
    """A user's balancer."""

    def __init__(self, tasks, needed):
        super().__init__(tasks)
