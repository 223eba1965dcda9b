"""Processes of their own that start with everything imported: forked from one that has, not started from nothing.

Importing takes longer than most runs of the tests. That the program runs in processes that start from nothing, alone
and under torchrun, is what test_ranks.py, test_errors.py and the test of the README's commands show.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir
from multiprocessing import reduction
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryFile
from typing import Any

import pytest
from torch.distributed import TCPStore

from mft_lightning.cli import COMMANDS

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as every command does, before peft imports it
ROOT = Path(__file__).resolve().parents[2]
LOCALHOST = "127.0.0.1"
LONG = 600.0  # seconds that processes may take on a machine that does other things too
_FORKING = multiprocessing.get_context("forkserver")
_LATER = ("peft", "torch.utils.tensorboard", "transformers.models.gpt_neox.modeling_gpt_neox")  # than a run's start
_FORKING.set_forkserver_preload([__name__, *(name.partition(":")[0] for name, _ in COMMANDS.values()), *_LATER])


def start(words: Sequence[str], environment: Mapping[str, str], *streams: int) -> BaseProcess:
    """``python …`` from the project's root.

    Args:
        words: a script and its arguments, ``-m``, a module and its arguments, or ``-c`` and a program.
        environment: all of it.
        streams: descriptors of its standard input, output and error; they stay open here.
    """
    passed = [_Passed(stream) for stream in streams]
    process = _FORKING.Process(target=_become, args=(list(words), dict(environment), passed))
    with pytest.MonkeyPatch.context() as patch, chdir(ROOT):  # for the first, which starts the one to fork from
        patch.setenv("OMP_NUM_THREADS", "1")  # which torch reads when it is imported
        patch.setenv("OMP_WAIT_POLICY", "passive")
        process.start()
    return process


class _Passed:
    """A descriptor that is another number, but the same file, in the process it is sent to."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.descriptor),)


def _received(sent: Any) -> int:
    return sent.detach()


def _become(words: list[str], environment: dict[str, str], streams: list[int]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def run(words: Sequence[str], environment: Mapping[str, str]) -> CompletedProcess[str]:
    """``python …`` to its end, as ``subprocess.run`` tells of it."""
    return _run(words, [environment])


def run_on_ranks(ranks: int, words: Sequence[str], environment: Mapping[str, str]) -> CompletedProcess[str]:
    """``python …`` on so many ranks, with the environment that torchrun gives them, to their end.

    When one of them fails, the others are ended too.
    """
    store = TCPStore(LOCALHOST, 0, is_master=True, wait_for_workers=False)
    shared = {
        **environment,
        "MASTER_ADDR": LOCALHOST,
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "forked",
    }
    return _run(words, [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)])


def _run(words: Sequence[str], environments: Sequence[Mapping[str, str]]) -> CompletedProcess[str]:
    with Path(os.devnull).open() as nothing, TemporaryFile("a+") as output, TemporaryFile("a+") as errors:
        streams = (nothing.fileno(), output.fileno(), errors.fileno())
        processes = [start(words, environment, *streams) for environment in environments]
        running, deadline = processes, time.monotonic() + LONG
        while running:
            if not wait([process.sentinel for process in running], deadline - time.monotonic()):
                _end(running)
                told = [stream.seek(0) or stream.read() for stream in (output, errors)]
                raise AssertionError(f"{len(running)} of {len(processes)} have not ended: {' '.join(told)}")
            running = [process for process in running if process.is_alive()]
            if any(process.exitcode for process in processes if not process.is_alive()):
                _end(running)
        code = next((process.exitcode for process in processes if process.exitcode), 0)
        told = [stream.seek(0) or stream.read() for stream in (output, errors)]
        return CompletedProcess([*words], code, *told)


def exit_code(process: BaseProcess) -> int | None:
    """Of one that ends."""
    process.join(120)
    return process.exitcode


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(30)
        process.kill()
