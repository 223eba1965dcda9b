"""Several processes start, say things once, and end together, whoever starts them and whatever goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration import one_by_one
from tests.integration.conftest import ROOT, checkpoints, everything, metrics, same_weights, user_environment
from tests.integration.layouts import in_series

OWN = (sys.executable, "-m", "mft_lightning")
TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "mft_lightning",
)
KILLED, BY_CHANCE = "error: rank 1 was ended from outside by SIGKILL", "ZeroDivisionError: by chance"
LONG = 400.0  # seconds that a series may take on a machine that does other things too
SOON = 60.0  # seconds until the last rank has ended


@pytest.fixture
def arguments(fit_arguments: Callable[..., list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    """``fit`` on two ranks, for a few steps."""

    def make(*words: str) -> list[str]:
        few = ("--trainer.max_steps", "4", "--evaluation.at_start", "false", "--evaluation.steps", "100")
        return ["fit", *fit_arguments(tmp_path / "run", *few, *words, config="ddp.yaml")]

    return make


def fault(kind: str, rank: int, hook: str = "train_batch_start") -> tuple[str, ...]:
    named, key = "--trainer.callbacks+=tests.integration.faults.Fault", "--trainer.callbacks"
    return (named, f"{key}.kind", kind, f"{key}.rank", str(rank), f"{key}.hook", hook)


def run(launcher: tuple[str, ...], words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """A command that must end by itself, and all processes it started with it."""
    mark = f"MFT_TEST={time.monotonic_ns()}"
    name, _, value = mark.partition("=")
    environment = {**user_environment(), **variables, name: value}
    done = subprocess.run(
        [*launcher, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONG, check=False
    )
    deadline = time.monotonic() + SOON
    while left := _processes(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    return done


def _processes(mark: str) -> list[str]:
    """Processes whose environment holds ``mark``, as theirs and their children's does."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (directory / "environ").read_bytes().split(b"\0"):
                found.append((directory / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # gone in the meantime, or another user's
            continue
    return found


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


def test_it_starts_its_own_ranks_and_measures_with_them(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    elsewhere = {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"}  # where other machines meet means nothing to one
    trained = run(OWN, arguments(), **elsewhere)
    assert (trained.returncode, trained.stderr) == (0, "")
    assert "2 x cpu, ddp" in trained.stdout
    assert trained.stdout.count("step 1/4") == trained.stdout.count("trained to step 4") == 1
    assert checkpoints(tmp_path / "run") == ["step-00000004"]
    before = everything(tmp_path / "run")
    measured = run(OWN, ["validate", *arguments("--ckpt_path", "last")[1:], "--trainer.strategy", "fsdp"])
    assert (measured.returncode, measured.stderr) == (0, "")
    (loss,) = [line.split()[1] for line in measured.stdout.splitlines() if line.startswith("val/loss")]
    assert float(loss) == pytest.approx(float(metrics(tmp_path / "run")[-1]["val/loss"]), abs=1e-6)
    assert everything(tmp_path / "run") == before


def test_it_starts_the_ranks_of_a_sharded_run(fit_arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    few = ("--trainer.max_steps", "2", "--evaluation.strategy", "none")
    done = run(OWN, ["fit", *fit_arguments(tmp_path / "run", *few, config="fsdp.yaml")])
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 x cpu, fsdp" in done.stdout and checkpoints(tmp_path / "run") == ["step-00000002"]


def test_another_rank_fails(arguments: Callable[..., list[str]]) -> None:
    done = run(OWN, arguments(*fault("kill", 1)))
    assert done.returncode == 1
    assert done.stderr.startswith(KILLED) and done.stderr.count("\n") == 1, done.stderr


def test_the_first_rank_is_killed(arguments: Callable[..., list[str]]) -> None:
    done = run(OWN, arguments(*fault("kill", 0)))
    assert done.returncode == -signal.SIGKILL
    (message,) = told(done)
    assert message.startswith("error: rank 1: another rank is gone without a word, or out of reach (")


@pytest.mark.parametrize(("kind", "rank"), [("term", 0), ("term", 1), ("interrupt", 1)])
def test_a_signal_to_one_rank_ends_all_in_order(
    arguments: Callable[..., list[str]], tmp_path: Path, kind: str, rank: int
) -> None:
    done = run(OWN, arguments(*fault(kind, rank)))
    signum = signal.SIGTERM if kind == "term" else signal.SIGINT
    assert (done.returncode, done.stderr) == (128 + signum, "")
    assert done.stdout.endswith(f"stopped by {signum.name}\n")
    assert checkpoints(tmp_path / "run") == ["step-00000003"]


@pytest.mark.parametrize("launcher", [OWN, TORCHRUN], ids=["own", "torchrun"])
def test_a_signal_to_one_rank_in_the_last_validation_is_known_to_all(
    arguments: Callable[..., list[str]], launcher: tuple[str, ...]
) -> None:
    done = run(launcher, arguments(*fault("term", 1, "validation_end")))
    assert done.returncode == (128 + signal.SIGTERM if launcher == OWN else 1)
    assert done.stdout.endswith("stopped by SIGTERM when all steps were done\n")


def test_a_stop_that_one_rank_asks_for_is_for_all(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """At once, in a validation, and at an epoch's end; so does one that all decide on, as validation gets no better."""
    epochs = ("--trainer.max_steps", "-1", "--trainer.max_epochs", "3", "--data.total_train_batch_size", "64")
    no_better = ("--early_stopping.patience", "1", "--early_stopping.min_delta", "100")
    early = ("--evaluation.at_start", "false", "--evaluation.steps", "1")
    lines = [
        arguments(*fault("stop", 1), "--trainer.strategy", "fsdp"),
        arguments(*epochs, *fault("stop", 1, "epoch_end"), "--output_dir", str(tmp_path / "epochs")),
        arguments(*no_better, "--evaluation.steps", "1", "--output_dir", str(tmp_path / "early")),
        arguments(*fault("stop", 1, "validation_end"), *early, "--output_dir", str(tmp_path / "validated")),
    ]
    printed = in_series(2, lines, tmp_path)
    assert checkpoints(tmp_path / "run") == ["step-00000003"]
    assert checkpoints(tmp_path / "early")[-1] == "step-00000002"
    assert checkpoints(tmp_path / "validated") == ["step-00000001"]
    assert "validation at step 3" in printed and "(1.0 epochs)" in printed


def test_a_signal_ends_a_measurement(arguments: Callable[..., list[str]]) -> None:
    for rank, code in ((0, 128 + signal.SIGTERM), (1, 1)):
        done = run(OWN, ["validate", *arguments(*fault("term", rank, "validation_start"))[1:]])
        assert done.returncode == code
        assert [line.split(" (")[0] for line in told(done)] == [
            f"error: rank {rank} was ended from outside by SIGTERM" for _ in range(rank)
        ]


def test_a_process_goes_on_after_runs_that_failed(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """In training on either rank, on another one when the work is done, and by an error of Python on one or on all.

    A record that one rank cannot read, and losses that are not finite on one rank, are among them.
    """
    spoilt, key = "--trainer.callbacks+=tests.integration.faults", "--trainer.callbacks"
    unread = (f"{spoilt}.BadRecord", f"{key}.rank", "1", "--data.num_workers", "1")
    not_finite = (f"{spoilt}.NotFinite", f"{key}.what=loss", f"{key}.rank=1", f"{key}.steps=[1,2]")
    failing = {
        fault("user", 1): "error: rank 1: a record is bad.",
        fault("user", 0): "error: a record is bad.",
        fault("user", 1, "train_end"): "error: rank 1: a record is bad.",
        fault("kill", 1, "teardown"): KILLED,
        (*fault("python", 1), "--trainer.strategy", "fsdp"): BY_CHANCE,
        (*fault("python", -1), "--trainer.strategy", "fsdp"): BY_CHANCE,
        unread: BY_CHANCE,
        (*not_finite, "--model.max_skipped_steps", "2"): "step 3: this is skipped step 2 in a row",
    }
    lines = [arguments(*words) for words in (*failing, ("--trainer.devices", "1"), ())]
    lines = [[*line, "--output_dir", str(tmp_path / str(number))] for number, line in enumerate(lines)]
    (tmp_path / "commands.json").write_text(json.dumps(lines))
    done = run((sys.executable, "tests/integration/one_by_one.py"), [str(tmp_path / "commands.json")])
    *printed, codes = done.stdout.split(one_by_one.END)
    assert codes.strip() == "codes 1 1 1 1 1 1 1 1 0 0", done.stdout + done.stderr
    for message, said, shown in zip(failing.values(), done.stderr.split(one_by_one.END), printed, strict=False):
        assert "trained to step" not in shown
        if message == BY_CHANCE:
            assert said.count(message) == 1, said
        else:
            assert said.startswith("error: ") and message in said and said.count("\n") == 1, said
    assert all("trained to step" in shown for shown in printed[-2:])


def test_under_torchrun_an_error_of_all_is_told_once(
    arguments: Callable[..., list[str]], write_task: Callable[..., str], tmp_path: Path
) -> None:
    bad = write_task("bad", ['{"prompt": "1 + 1?"'])
    done = run(TORCHRUN, arguments("--data.data_paths", f"[{bad}]"))
    assert done.returncode == 1
    assert len(told(done)) == 1 and "part.jsonl:1: is not valid JSON" in told(done)[0], done.stderr
    assert not (tmp_path / "run").exists()


def test_under_torchrun_an_error_of_one_is_told_with_its_rank(arguments: Callable[..., list[str]]) -> None:
    done = run(TORCHRUN, arguments(*fault("user", 1)))
    assert done.returncode == 1
    assert told(done) == ["error: rank 1: a record is bad."]


def test_torchrun_starts_ranks_again_and_they_go_on(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    words = arguments("--ckpt_path", "last", "--checkpoint.checkpointing_steps", "2")
    done = run((*TORCHRUN[:3], "--max-restarts", "1", *TORCHRUN[3:]), [*words, *fault("kill", 1)])
    assert done.returncode == 0, done.stderr
    assert "going on from step-00000002" in done.stdout and done.stdout.count("trained to step 4 of 4") == 1
    (message,) = told(done)
    assert message.startswith("error: another rank is gone without a word")
    in_series(2, [[*words, "--output_dir", str(tmp_path / "whole")]], tmp_path)
    assert same_weights(tmp_path / "run" / "step-00000004", tmp_path / "whole" / "step-00000004")


def test_what_torchrun_started_must_be_what_is_asked_for(arguments: Callable[..., list[str]]) -> None:
    done = run(TORCHRUN, arguments("--trainer.devices", "3"))
    assert done.returncode == 1
    (message,) = told(done)
    assert "trainer.devices: 3 asks for 3 on each node, but torchrun started 2 process(es)" in message


@pytest.fixture
def in_a_terminal(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a long run in a group of its own, until it has printed something."""
    started = []

    def start(until: str, *words: str, launcher: tuple[str, ...] = OWN) -> subprocess.Popen[bytes]:
        log = tmp_path / "printed"
        with log.open("w") as handle:
            process = subprocess.Popen(
                [*launcher, *arguments("--trainer.max_steps", "100000", *words)],
                cwd=ROOT,
                env=user_environment(),
                stdout=handle,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        started.append(process)
        deadline = time.monotonic() + 2 * SOON
        while until not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def interrupt(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it


def rest(process: subprocess.Popen[bytes]) -> list[str]:
    """What it says on standard error until it ends, which it must."""
    _, said = process.communicate(timeout=SOON)
    assert process.returncode == 128 + signal.SIGINT
    return said.decode().splitlines()


ENDING = ["", "ending after this step, with a checkpoint; Ctrl-C again breaks off"]


def test_ctrl_c_reaches_all_ranks_at_once(
    in_a_terminal: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = in_a_terminal("step 3/")
    interrupt(process)
    assert rest(process) == ENDING
    assert "stopped by SIGINT" in (tmp_path / "printed").read_text()
    info = json.loads((tmp_path / "run" / checkpoints(tmp_path / "run")[-1] / "checkpoint.json").read_text())
    assert info["metrics"]  # validated before it was saved


def test_ctrl_c_while_ranks_start_is_heard_at_once(
    in_a_terminal: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = in_a_terminal("starting 1 more")
    time.sleep(0.5)  # the other rank takes seconds
    interrupt(process)
    assert rest(process) == ["error: interrupted."]
    assert not (tmp_path / "run").exists()


def test_ctrl_c_twice_breaks_off_though_a_rank_hangs(in_a_terminal: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = in_a_terminal("step 1/", *fault("sleep", 1))
    time.sleep(2)
    interrupt(process)
    time.sleep(0.5)
    interrupt(process)
    assert rest(process) == [*ENDING, "error: interrupted."]


def test_one_ctrl_c_is_one_though_workers_hear_it_too(
    in_a_terminal: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """One rank with two workers, and a step that takes longer than a second Ctrl-C would let it."""
    alone = ("--trainer.strategy", "auto", "--trainer.devices", "1", "--data.num_workers", "2")
    process = in_a_terminal("step 1/", *alone, *fault("pause", 0))
    time.sleep(1)
    interrupt(process)
    assert rest(process) == ENDING
    assert "stopped by SIGINT" in (tmp_path / "printed").read_text()
    assert checkpoints(tmp_path / "run") == ["step-00000003"]


@pytest.mark.parametrize(("devices", "signum"), [("1", signal.SIGTERM), ("2", signal.SIGUSR1)])
def test_preemption_saves_though_workers_hear_it_too(
    in_a_terminal: Callable[..., subprocess.Popen[bytes]], tmp_path: Path, signum: signal.Signals, devices: str
) -> None:
    """SLURM's signals go to every process; a worker that ended by one would take the run with it."""
    words = ("--trainer.strategy", "auto", "--trainer.devices", devices, "--data.num_workers", "2")
    process = in_a_terminal("step 1/", *words, *fault("pause", 0))
    time.sleep(1)
    os.killpg(process.pid, signum)
    assert (process.wait(SOON), process.stderr.read()) == (128 + signum, b"")
    printed = (tmp_path / "printed").read_text()
    assert f"stopped by {signum.name}" in printed and "go on" in printed
    assert checkpoints(tmp_path / "run") == ["step-00000003"]


def test_torchrun_passes_sigterm_on_and_the_run_saves(
    in_a_terminal: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = in_a_terminal("step 1/", "--data.num_workers", "1", *fault("pause", 0), launcher=TORCHRUN)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=SOON)
    assert "stopped by SIGTERM" in (tmp_path / "printed").read_text()
    assert checkpoints(tmp_path / "run") == ["step-00000003"]


def test_an_error_while_workers_run_ends_the_run(arguments: Callable[..., list[str]]) -> None:
    alone = ("--trainer.strategy", "auto", "--trainer.devices", "1", "--data.num_workers", "2")
    done = run(OWN, arguments(*alone, *fault("user", 0)))
    assert (done.returncode, told(done)) == (1, ["error: a record is bad."])
