"""A run that is out of memory ends with what to change, and with the command that tells how much that saves."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import resource_sharer
from pathlib import Path

import pytest
import torch

from mft_lightning.cli import main
from mft_lightning.commands import evaluate, fit, generate, predict
from mft_lightning.out_of_memory import is_lost_worker
from tests.integration.conftest import command


def no_gpu_memory(_: list[str]) -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB. Of the allocated "
        "memory 77.00 GiB is allocated by PyTorch."
    )


def no_host_memory(_: list[str]) -> None:
    torch.empty(10**15)


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize(
    ("fails", "said"), [(no_gpu_memory, "CUDA out of memory"), (no_host_memory, "you tried to allocate")]
)
def test_it_is_one_message(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    fails: Callable[..., None],
    said: str,
) -> None:
    monkeypatch.setattr(fit if command == "fit" else evaluate, command, fails)
    assert main([command, "--config", "full.yaml", "--data.data_paths", "[a, b]"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: out of memory: ") and message.count("\n") == 1 and said in message
    assert "Of the allocated" not in message and "enforce fail" not in message
    assert "model.checkpoint_activations: true" in message and "data.per_device_train_batch_size" in message
    assert message.endswith("mft_lightning estimate --config full.yaml --data.data_paths '[a, b]'\n")


@pytest.mark.parametrize("command", ["generate", "predict"])
def test_who_answers_is_told_to_answer_fewer_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr(generate if command == "generate" else predict, command, no_gpu_memory)
    assert main([command, "--batch_size", "64"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: out of memory: CUDA out of memory") and message.count("\n") == 1
    assert "a smaller --batch_size" in message and "per_device_train_batch_size" not in message
    assert ("the same command goes on" in message) == (command == "predict")


def test_another_error_is_a_defect_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: list[str]) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(fit, "fit", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        main(["fit"])


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that", True),
        ("DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details are lost", True),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", True),
        ("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback", False),
        ("Too many open files. Communication with the workers is no longer possible.", False),
    ],
)
def test_what_torch_says_of_a_loading_process(said: str, lost: bool) -> None:
    assert is_lost_worker(RuntimeError(said)) is lost


def test_a_batch_that_cannot_be_fetched_is_of_a_lost_process() -> None:
    with pytest.raises((ConnectionError, FileNotFoundError)) as lost:
        resource_sharer._resource_sharer.get_connection(("/gone/socket", 1))
    assert is_lost_worker(lost.value) and not is_lost_worker(ConnectionRefusedError())


@pytest.mark.parametrize(("config", "rank"), [("full.yaml", 0), ("ddp.yaml", 1)], ids=["one process", "two ranks"])
def test_a_loading_process_that_is_killed_ends_the_run_with_one_message(
    fit_arguments: Callable[..., list[str]], tmp_path: Path, config: str, rank: int
) -> None:
    """Those of several ranks are started by a server, whose children they are."""
    fault, key = "--trainer.callbacks+=tests.integration.faults.Fault", "--trainer.callbacks"
    words = (fault, f"{key}.kind", "worker", f"{key}.rank", str(rank), "--data.num_workers", "1")
    steps = ("--trainer.max_steps", "1000", "--evaluation.strategy", "none")
    done = command("fit", *fit_arguments(tmp_path / "run", *words, *steps, config=config))
    assert done.returncode == 1
    begin = f"error: rank {rank}: " if rank else "error: "
    assert done.stderr.startswith(f"{begin}a process that loads data is gone ("), done.stderr
    assert done.stderr.count("\n") == 1 and "data.num_workers" in done.stderr, done.stderr
    assert done.stderr.endswith("Go on with --ckpt_path last.\n")
