"""A lock that a second run finds, and that a killed one does not leave behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mft_lightning.errors import UserError
from mft_lightning.training.run_lock import only_run_in


def started(work: Callable[[], None]) -> int:
    """A process that does ``work`` and then nothing, once it has come so far."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        work()
        os.write(writing, b"!")
        time.sleep(600)
        os._exit(0)
    assert os.read(reading, 1) == b"!"
    os.close(reading)
    os.close(writing)
    return child


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    child = started(only_run_in(tmp_path).__enter__)
    try:
        with pytest.raises(UserError, match=rf"another run is at work in .*process {child} on "), only_run_in(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with only_run_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_forked_worker_that_outlives_a_kill_does_not_hold_it(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    def work() -> None:
        only_run_in(tmp_path).__enter__()
        worker = started(lambda: None)
        os.write(writing, str(worker).encode())

    child = started(work)
    worker = int(os.read(reading, 20))
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.kill(worker, 0)  # is there
        with only_run_in(tmp_path):
            assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_directory_that_nothing_was_put_into_goes_again(tmp_path: Path) -> None:
    with only_run_in(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with only_run_in(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), only_run_in(tmp_path / "file" / "run"):
        pass
