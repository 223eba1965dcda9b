"""Contenders in processes of their own, let go in turns, one step each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.throughput.contenders import Contender
from benchmarks.throughput.pausing import MARK
from benchmarks.throughput.workload import Workload

ROOT = Path(__file__).resolve().parents[2]
LAST_WORDS = 2000  # letters of a process's log that are looked at where it ended


@dataclass
class Measured:
    """What a contender's steps were.

    Attributes:
        contender: whose they are.
        seconds: of each measured step.
        gemm: operations a second of matrix products before each of them.
        losses: of every step.
        peak: bytes of memory in use at most.
        failed: its last words, if it ended before its time.
    """

    contender: Contender
    seconds: list[float] = field(default_factory=list)
    gemm: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int = 0
    failed: str | None = None


class Ended(Exception):
    """A process that ended while it was waited for; says its last words."""


class Paused:
    """A process that waits to be let go, again and again (``pausing.py``).

    Args:
        python: its interpreter.
        words: what that is given.
        threads: for its computations.
        log: a file for what it says.
    """

    def __init__(self, python: str, words: list[str], threads: int, log: Path) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        self.log = log.open("w+")
        self.process = subprocess.Popen(
            [python, *words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def wait(self) -> dict[str, Any]:
        """What it tells when it pauses next.

        Raises:
            Ended: it does not.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
            self.log.write(line)
        self.process.wait()
        self.log.flush()
        said = Path(self.log.name).read_text(errors="replace")[-LAST_WORDS:].strip()
        raise Ended(said.splitlines()[-1] if said else f"exit code {self.process.returncode}")

    def go(self) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise Ended(f"exit code {self.process.wait()}") from error

    def step(self) -> dict[str, Any]:
        """Let it go, and what it tells then."""
        self.go()
        return self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            assert stream is not None
            with suppress(BrokenPipeError):  # of a line that it did not read any more
                stream.close()


def take_turns(
    contenders: list[Contender],
    pythons: Mapping[str, str],
    workload: Workload,
    *,
    warm_up: int,
    rounds: int,
    threads: int,
) -> list[Measured]:
    """Let contenders take steps in turns, all of one precision.

    Args:
        contenders: that take part.
        pythons: the interpreter of each program.
        workload: what they do.
        warm_up: rounds that are not measured.
        rounds: that are.
        threads: of each.

    Returns:
        What each contender's steps were.
    """
    precision = contenders[0].precision
    dtype = "float32" if precision == "32-true" else "bfloat16"
    logs = Path(workload.directory) / "logs"
    logs.mkdir(exist_ok=True)
    results = [Measured(contender) for contender in contenders]
    with ExitStack() as stack:
        gemm_words = ["-m", "benchmarks.throughput.gemm", workload.device, dtype]
        gemm = stack.enter_context(Paused(sys.executable, gemm_words, threads, logs / "gemm.log"))
        processes = [
            stack.enter_context(
                Paused(
                    pythons[contender.program],
                    contender.words(workload),
                    threads,
                    logs / f"{contender.name}, {contender.method}, {contender.precision}.log",
                )
            )
            for contender in contenders
        ]
        gemm.wait()
        for result, process in zip(results, processes, strict=True):
            _tell(result, process.wait)
        for number in range(warm_up + rounds):
            for result, process in zip(results, processes, strict=True):
                speed = gemm.step()["speed"]
                if (told := _tell(result, process.step)) is not None:
                    result.losses.append(told["loss"])
                    result.peak = told["peak"]
                    if number >= warm_up:
                        result.seconds.append(told["seconds"])
                        result.gemm.append(speed)
    return results


def _tell(result: Measured, wait: Any) -> dict[str, Any] | None:
    if result.failed is None:
        try:
            return wait()
        except Ended as error:
            result.failed = str(error)
    return None
