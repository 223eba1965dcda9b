"""The time left of a run follows the mean pace of its steps, and a clock may end it before."""

from __future__ import annotations

import pytest

from mft_lightning.training import progress
from mft_lightning.training.progress import Pace


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
