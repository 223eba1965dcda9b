"""Commands of the program in forks of this process, which need not import again what it has imported."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

TIMEOUT = 120.0  # seconds that a command may take
TAIL = 30  # lines of a log that an error shows


class FailedError(Exception):
    """A command ended in another way than it should."""


def run_forked(words: list[str], ranks: int, log: Path, variables: dict[str, str], timeout: float = TIMEOUT) -> bool:
    """Run a command on so many ranks, as torchrun would start them.

    Args:
        words: of the command line.
        ranks: how many processes; one has no launcher's environment.
        log: what the ranks print goes to its end.
        variables: of the environment, beside those of this process.
        timeout: seconds until it must have ended.

    Returns:
        Whether a rank was ended by SIGKILL, after which the others were too; else all exit codes were 0.

    Raises:
        FailedError: another end, or none in time; with the last lines of the log.
    """
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process that forks must have no threads"
    port, pipe = str(_free_port()), os.pipe()
    running = [_fork(words, {**variables, **_launched(rank, ranks, port)}, log, rank, pipe) for rank in range(ranks)]
    for end in pipe:
        os.close(end)
    deadline = time.monotonic() + timeout
    try:
        while running:
            ended = {pid: code for pid in running if (code := _reap(pid)) is not None}
            running = [pid for pid in running if pid not in ended]
            if -signal.SIGKILL in ended.values():
                return True
            if failed := [code for code in ended.values() if code]:
                raise FailedError(f"ended with exit code {failed[0]}:\n{_tail(log)}")
            if time.monotonic() > deadline:
                raise FailedError(f"has not ended within {timeout:.0f} seconds:\n{_tail(log)}")
            time.sleep(0.002)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        for pid in running:
            _reap(pid, wait=True)
    return False


def _launched(rank: int, ranks: int, port: str) -> dict[str, str]:
    if ranks == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "forked",
    }


def _fork(words: list[str], variables: dict[str, str], log: Path, rank: int, pipe: tuple[int, int]) -> int:
    """Start a rank. Rank 0 has the store where ranks meet, torchrun's outlives them all: it ends after the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setpgid(0, 0)  # with the loader's processes that it will start
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(variables)
        os.close(pipe[0 if rank else 1])
        code = _call(words)
        sys.stdout.flush()
        sys.stderr.flush()
        if rank == 0 and code == 0:
            os.read(pipe[0], 1)  # until none of the others holds the pipe's other end
    finally:
        os._exit(code)


def _call(words: list[str]) -> int:
    import torch

    from mft_lightning.cli import main

    torch.set_num_threads(1)
    try:
        return main(words)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def _reap(pid: int, wait: bool = False) -> int | None:
    """The exit code of a process that has ended, minus the signal's number if one did it; None while it runs.

    What it has left behind in its group is ended too.
    """
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | (0 if wait else os.WNOHANG)) is None:
        return None
    with suppress(ProcessLookupError):  # it died before it had a group
        os.killpg(pid, signal.SIGKILL)  # still its number, because it is not yet waited for
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
