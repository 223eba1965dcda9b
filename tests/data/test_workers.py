"""Processes that work for this one, in an interpreter of their own: what they inherit is what is tested."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from mft_lightning import ranks
from mft_lightning.data.workers import ENDING_A_RUN, loader_options

LATEST = 30.0  # seconds
HELD: list[Any] = []  # to the interpreter's own end


class Facts(Dataset[tuple[int, int, list[bool]]]):
    """What a loader's process says of itself: its number, its parent's, and which signals it ignores."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[int, int, list[bool]]:
        ignored = [signal.getsignal(signum) is signal.SIG_IGN for signum in ENDING_A_RUN]
        return os.getpid(), os.getppid(), ignored


def facts() -> list[tuple[int, int, list[bool]]]:
    return list(DataLoader(Facts(), batch_size=None, **loader_options(2)))


def test_alone_they_are_forked_and_ignore_what_ends_a_run() -> None:
    for _, parent, ignored in facts():
        assert parent == os.getpid()
        assert all(ignored)


def test_without_workers_there_is_no_process() -> None:
    assert loader_options(0) == {"num_workers": 0, "pin_memory": False}


def test_of_a_rank_they_are_forked_from_a_server_that_signals_leave_alone() -> None:
    told = _own_python("server")
    assert told == ["True True", "True True", "the same server"]


def test_they_end_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, __file__, "orphans"], env=_environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + LATEST
    while (left := [pid for pid in workers if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def test_an_error_that_holds_them_lets_their_parent_end() -> None:
    assert _own_python("held") == ["held"]


def _runs(pid: int) -> bool:
    """Whether a process is there that has not ended; one that nobody waits for stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _own_python(what: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, __file__, what], env=_environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def _server() -> None:
    """The same server after every signal that ends a run."""
    options = loader_options(2)  # starts the server, whose imports take long enough for signals to meet it in them
    server = forkserver._forkserver._forkserver_pid
    for signum in ENDING_A_RUN:
        os.kill(server, signum)
    before = facts()
    assert options and before[0][1] == server
    for _, parent, ignored in before:
        print(parent != os.getpid(), all(ignored))
    for signum in ENDING_A_RUN:
        os.kill(server, signum)
    time.sleep(0.2)
    print("the same server" if {parent for _, parent, _ in facts()} == {server} else "another server")


def _orphans() -> None:
    kept = iter(DataLoader(Facts(), batch_size=None, **loader_options(2)))
    print(*(worker.pid for worker in kept._workers), flush=True)  # type: ignore[attr-defined]
    time.sleep(LATEST)


def _held() -> None:
    """As the traceback of an error that a worker raised holds the loader."""
    HELD.append(iter(DataLoader(Facts(), batch_size=None, **loader_options(1))))
    next(HELD[0])
    print("held")


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "are_several", lambda: True)
        {"server": _server, "orphans": _orphans, "held": _held}[sys.argv[1]]()
