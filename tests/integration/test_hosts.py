"""Two hosts under torchrun, one process on each: they train, one of them is lost, and the run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, checkpoints, same_weights, user_environment
from tests.integration.hosts import CABLE, Host, two_hosts

TORCHRUN = (*(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),)
MEETING = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "one:29500")
LONG = 200.0  # seconds that a series may take on a machine that does other things too
SOON = 60.0  # seconds in which the loss of a host must end the other
LOST = "another rank is gone without a word, or out of reach ("
GO_ON = "Go on with --ckpt_path last."


KILLED_AT_ITS_START = """
import os, signal, sys, time
from pathlib import Path
begun, rank = Path(__file__).with_name("begun"), os.environ["RANK"]
last = str(int(os.environ["WORLD_SIZE"]) - 1)
class Watch:
    def find_spec(self, name, *given):
        if name == "torch" and rank == str(int(last) - 1):
            begun.touch()
sys.meta_path.insert(0, Watch())
while rank == last:
    if begun.exists():
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
from mft_lightning.cli import main
raise SystemExit(main(["fit"]))
"""


class Launch:
    """A torchrun on each of two hosts, and what each says.

    Args:
        hosts: the two.
        words: a script or module, and its arguments.
        directory: for files of this launch.
        variables: of the environment, beside the usual ones.
    """

    def __init__(self, hosts: list[Host], words: list[str], directory: Path, **variables: str) -> None:
        self.hosts, self.logs = hosts, [directory / f"printed.{host.name}" for host in hosts]
        self.processes = []
        for host, log in zip(hosts, self.logs, strict=True):
            with log.open("w") as handle:
                command = host.command(*TORCHRUN, *MEETING, *words)
                environment = {**user_environment(), **variables, "PYTHONUNBUFFERED": "1"}
                self.processes.append(subprocess.Popen(command, env=environment, stdout=handle, stderr=handle))

    def printed(self, host: int) -> str:
        return self.logs[host].read_text()

    def codes(self) -> list[int]:
        """How both end."""
        deadline = time.monotonic() + LONG
        return [self.end(host, deadline - time.monotonic()) for host in (0, 1)]

    def end(self, host: int, seconds: float) -> int:
        try:
            return self.processes[host].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"has not ended:\n{self.printed(0)}\n{self.printed(1)}") from None

    def lose(self, lost: int, when: Callable[[], bool]) -> str:
        """Lose a host at a moment; what the other says of it."""
        deadline = time.monotonic() + LONG
        while not when():
            assert time.monotonic() < deadline and self.processes[0].poll() is None, self.printed(0) + self.printed(1)
            time.sleep(0.05)
        self.hosts[lost].lose()
        assert self.end(1 - lost, SOON) == 1
        self.end(lost, SOON)
        (message,) = [line for line in self.printed(1 - lost).splitlines() if line.startswith("error: ")]
        return message


def series(directory: Path, *lines: list[str]) -> list[str]:
    """Command lines one after the other."""
    directory.mkdir()
    (directory / "commands.json").write_text(json.dumps(lines))
    return ["tests/integration/in_series.py", str(directory / "commands.json")]


@pytest.fixture
def arguments(fit_arguments: Callable[..., list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    """``fit`` in a directory of this name, under this strategy; all share one token cache, which is empty at first."""

    def make(name: str, strategy: str, *words: str) -> list[str]:
        few = ("--evaluation.at_start", "false", "--trainer.strategy", strategy)
        cache = ("--data.cache_dir", str(tmp_path / "cache"))
        return ["fit", *fit_arguments(tmp_path / name, *few, *cache, *words, config="multi-node.yaml")]

    return make


def asleep(rank: int) -> tuple[str, ...]:
    """A rank stays where it is after five steps, so that its host is lost in the middle of a run."""
    named, key = "--trainer.callbacks+=tests.integration.faults.Fault", "--trainer.callbacks"
    return (named, f"{key}.kind", "sleep", f"{key}.rank", str(rank), f"{key}.step", "5")


def test_a_host_is_lost_and_the_run_goes_on_to_the_same_weights(
    arguments: Callable[..., list[str]], example_tasks: list[str], tmp_path: Path
) -> None:
    """Under DDP the second host, under FSDP2 the first one, with which rank 0 and the meeting place are gone.

    They go on on hosts whose own names are of no use to others, as Debian's installer leaves them.
    """
    counted = ("--trainer.callbacks+=tests.integration.encodings.Encodings", "--trainer.callbacks.file")
    with two_hosts(tmp_path) as hosts:
        words = series(
            directory := tmp_path / "first",
            arguments("ddp", "ddp", *counted, str(tmp_path / "encoded")),
            arguments("fsdp", "fsdp"),
            arguments("lost-ddp", "ddp", *asleep(1)),
        )
        launch = Launch(hosts, words, directory)
        message = launch.lose(1, lambda: in_the_middle(launch, tmp_path / "lost-ddp", runs=3))
        assert message.startswith(f"error: {LOST}") and message.endswith(GO_ON)
        assert "device      1 x cpu on each of 2 nodes, fsdp" in launch.printed(0)
        files = [file for task in example_tasks for file in Path(task).glob("*.jsonl")]
        encoded = (tmp_path / "encoded").read_text().splitlines()
        assert sorted(encoded) == sorted(f"one {file.parent.name}/{file.name}" for file in files)  # once, by one host

        words = series(
            directory := tmp_path / "second",
            arguments("lost-ddp", "ddp", "--ckpt_path", "last"),
            arguments("lost-fsdp", "fsdp", *asleep(0)),
        )
        launch = Launch(hosts, words, directory)
        message = launch.lose(0, lambda: in_the_middle(launch, tmp_path / "lost-fsdp", runs=2))
        assert message.startswith(f"error: rank 1: {LOST}") and message.endswith(GO_ON)
        assert "going on from step-00000004" in launch.printed(0)

    with two_hosts(tmp_path, own="127.0.1.1") as hosts:
        words = ["-m", "mft_lightning", *arguments("lost-fsdp", "fsdp", "--ckpt_path", "last")]
        refused = Launch(hosts, words, tmp_path)
        assert refused.codes() == [1, 1]
        for host, rank in enumerate(("", "rank 1: ")):
            said = refused.printed(host)
            if host == 1 and "The connection to the C10d store has failed" in said:
                continue  # the first host was refused so early that its torchrun took the store away from the second's
            assert f"error: {rank}on the host " in said
            assert ": its own name stands for 127.0.1.1, where no other host finds it. Set G" in said
        third = Launch(hosts, words, tmp_path, GLOO_SOCKET_IFNAME=CABLE)
        assert third.codes() == [0, 0], third.printed(0) + third.printed(1)
        assert "going on from step-00000004" in third.printed(0)

    for strategy in ("ddp", "fsdp"):
        assert same_weights(*(tmp_path / name / "step-00000008" for name in (strategy, f"lost-{strategy}")))


def in_the_middle(launch: Launch, run: Path, runs: int) -> bool:
    """Whether so many runs have taken the fifth step, the last of which has a checkpoint of its fourth."""
    return launch.printed(0).count("step 5/8") == runs and checkpoints(run) == ["step-00000004"]


def test_a_rank_that_is_killed_while_it_starts_ends_those_of_the_other_host(tmp_path: Path) -> None:
    """torchrun ends its neighbour by SIGTERM, in the midst of its imports, which lets the others know."""
    (tmp_path / "start.py").write_text(KILLED_AT_ITS_START)
    with two_hosts(tmp_path) as hosts:
        launch = Launch(hosts, ["--nproc-per-node", "2", str(tmp_path / "start.py")], tmp_path, PYTHONPATH=str(ROOT))
        assert launch.codes() == [1, 1]
    (error,) = [line for line in launch.printed(0).splitlines() if line.startswith("error: ")]
    assert error.startswith("error: on the host two, rank 2: ended by SIGTERM before all ranks had met.")
    assert "Signal 9 (SIGKILL)" in launch.printed(1)  # in torchrun's words


def test_a_host_whose_only_rank_is_killed_while_it_starts_ends_the_other(tmp_path: Path) -> None:
    """Of which it hears from nobody, so that it waits; for a minute on its own, here for less."""
    (tmp_path / "start.py").write_text(KILLED_AT_ITS_START)
    with two_hosts(tmp_path) as hosts:
        words = [str(tmp_path / "start.py")]
        launch = Launch(hosts, words, tmp_path, PYTHONPATH=str(ROOT), MFT_LIGHTNING_MEETING="10")
        assert launch.codes() == [1, 1]
    (error,) = [line for line in launch.printed(0).splitlines() if line.startswith("error: ")]
    assert error.startswith("error: not all ranks came within 10 seconds") and ": not there: rank 1." in error
    assert "Signal 9 (SIGKILL)" in launch.printed(1)
