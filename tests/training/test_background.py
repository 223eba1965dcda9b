"""Work beside the training: one piece at a time, and no error lost."""

from __future__ import annotations

import threading

import pytest

from mft_lightning.training.background import Background


def test_one_piece_of_work_at_a_time() -> None:
    background, gate, done = Background(), threading.Event(), []

    def first() -> None:
        gate.wait(10)
        done.append("first")

    background.start(first)
    assert done == []  # it goes on meanwhile
    threading.Timer(0.1, gate.set).start()
    background.start(lambda: done.append("second"))
    assert done[0] == "first"  # which the second waited for
    background.wait()
    assert done == ["first", "second"]


@pytest.mark.parametrize("later", ["start", "wait", "raise_error"])
def test_an_error_is_raised_once_by_whatever_comes_next(later: str) -> None:
    background, over = Background(), threading.Event()

    def fail() -> None:
        try:
            1 / 0  # noqa: B018
        finally:
            over.set()

    background.start(fail)
    over.wait(10)
    background._thread.join(10)
    with pytest.raises(ZeroDivisionError):
        background.start(lambda: None) if later == "start" else getattr(background, later)()
    background.wait()
