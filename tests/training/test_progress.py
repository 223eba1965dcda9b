"""The time left of a run follows the mean pace of its steps, and a clock may end it before."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from mft_lightning.training import progress
from mft_lightning.training.progress import Pace, RunBar


class Clock:
    """Stands in for ``time.perf_counter``."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class MaxTime:
    """Stands in for Lightning's Timer."""

    def __init__(self, remaining: float) -> None:
        self.remaining = remaining

    def time_remaining(self) -> float:
        return self.remaining


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", made)
    return made


def test_the_time_left(clock: Clock) -> None:
    pace = Pace(300)
    assert pace.left(1) == ""  # nothing to go by
    clock.now += 90
    assert pace.left(10) == "48:20"  # 10 seconds a step
    clock.now += 90
    assert pace.left(100) == "6:04"
    assert pace.left(300) == "0:00"


def test_a_resumed_run_is_measured_from_where_it_goes_on(clock: Clock) -> None:
    pace = Pace(300)
    assert pace.left(201) == ""
    clock.now += 9
    assert pace.left(210) == "1:30"


def test_a_time_limit_may_come_first(clock: Clock) -> None:
    pace = Pace(300, MaxTime(61.0))  # type: ignore[arg-type]
    pace.left(1)
    clock.now += 90
    assert pace.left(10) == "1:01"
    assert Pace(300, MaxTime(-5.0)).left(1) == ""  # type: ignore[arg-type]


def test_losses_below_the_bar_are_those_of_the_last_logged_step(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", lambda: Console(file=file, width=70, force_terminal=True))
    trainer: Any = SimpleNamespace(global_step=0, callback_metrics={}, sanity_checking=False, num_val_batches=[3])
    module: Any = SimpleNamespace(datamodule=SimpleNamespace(task_names=["a", "b"]))
    bar = RunBar(4)
    bar.on_train_start(trainer, module)

    def shown_after(**logged: float) -> str:
        values = {name.replace("_", "/"): torch.tensor(value) for name, value in logged.items()}
        trainer.callback_metrics |= values
        trainer.global_step += 1
        bar.on_train_batch_end(trainer, module)
        assert bar._progress is not None
        file.seek(0), file.truncate()
        bar._progress.refresh()
        return file.getvalue()

    trainer.callback_metrics["train/tokens_per_second"] = torch.tensor(1.0)
    assert "b 3.0000" in shown_after(train_loss=3.0, train_loss_b=3.0)
    assert "a 1.0000  b 3.0000" in shown_after(train_loss=2.0, train_loss_b=3.0, train_loss_a=1.0)  # in their order
    said = shown_after(train_loss=0.5, train_loss_b=0.5)
    assert "b 0.5000" in said and "a 1.0000" not in said
    assert "b 0.5000" in shown_after()  # of a step that was not logged
    trainer.callback_metrics |= {"train/loss": torch.tensor(0.25), "train/loss/a": torch.tensor(0.25)}
    trainer.global_step += 1
    bar.on_validation_start(trainer, module)  # before the end of its step
    file.seek(0), file.truncate()
    assert bar._progress is not None
    bar._progress.refresh()
    assert "5/" in file.getvalue() and "a 0.2500" in file.getvalue() and "0/3" in file.getvalue()
    bar.on_train_end(trainer, module)
