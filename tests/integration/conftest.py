"""Runs of the command line, as a user types it."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mft_lightning.cli import main
from mft_lightning.run_config import RunConfig
from mft_lightning.training.checkpoint_dirs import read_metadata, write_metadata
from tests.integration import preloaded
from tests.integration.in_series import setup_once

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("text_to_code", "code_explanation", "unit_tests")
TIMED = ("train/tokens_per_second", "train/mfu")


def user_environment() -> dict[str, str]:
    """The environment of a command: two cores are shared, so each process keeps to one."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """``python -m mft_lightning …`` from the project's root, with everything imported when it starts."""
    return preloaded.run(["-m", "mft_lightning", *words], user_environment())


def read_terminal(mine: int) -> str:
    """What was written to a terminal, until the last who has it open is gone."""
    written = b""
    while True:
        try:
            part = os.read(mine, 65536)
        except OSError:  # how Linux tells that the other side is closed
            part = b""
        if not part:
            os.close(mine)
            return written.decode()
        written += part


@pytest.fixture(scope="package", autouse=True)
def parsers_made_once() -> Iterator[None]:
    """Commands that tests run in their own process share the parser of each; those in processes of their own do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunConfig, "setup_parser", setup_once())
        yield


@pytest.fixture(scope="session")
def fit_arguments(tiny_model: Path, example_tasks: list[str]) -> Callable[..., list[str]]:
    """``fit_arguments(output_dir, "--trainer.max_steps", "8", config="lora.yaml")``: a quick run on the examples."""

    def arguments(output_dir: Path, *words: str, config: str = "full.yaml") -> list[str]:
        quick = {
            "--config": str(ROOT / "configs" / config),
            "--output_dir": str(output_dir),
            "--data.data_paths": f"[{','.join(example_tasks)}]",
            "--model.pretrained_model_path": str(tiny_model),
            "--model.learning_rate": "1e-2",
            "--model.num_warmup_steps": "2",
            "--data.num_workers": "0",
            "--data.total_train_batch_size": "16",
            "--trainer.max_epochs": "null",
            "--trainer.max_steps": "8",
            "--trainer.log_every_n_steps": "1",
            "--evaluation.steps": "4",
            "--evaluation.max_conversations_per_task": "6",
            "--evaluation.samples_per_task": "0",
            "--checkpoint.checkpointing_steps": "4",
        }
        if config in ("lora.yaml", "qlora.yaml"):
            quick["--model.lora.r"] = "4"
        return [*(word for pair in quick.items() for word in pair), *words]

    return arguments


@pytest.fixture(scope="session")
def fit(fit_arguments: Callable[..., list[str]]) -> Callable[..., Path]:
    """Run ``fit`` in this process, which must succeed."""

    def run(output_dir: Path, *words: str, config: str = "full.yaml") -> Path:
        assert main(["fit", *fit_arguments(output_dir, *words, config=config)]) == 0
        return output_dir

    return run


@pytest.fixture(scope="session")
def checkpoint(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned enough for answers to differ, and for some of them to end."""
    words = ("--trainer.max_steps", "60", "--evaluation.strategy", "none", "--checkpoint.checkpointing_steps", "60")
    return fit(tmp_path_factory.mktemp("full"), *words) / "step-00000060"


@pytest.fixture
def refused(fit_arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must end with one message and exit code 1 and leave ``output_dir`` as it is; the message."""

    def run(output_dir: Path, *words: str, config: str = "full.yaml", command: str = "fit") -> str:
        before = everything(output_dir)
        capsys.readouterr()
        assert main([command, *fit_arguments(output_dir, *words, config=config)]) == 1
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") <= 12 and "Traceback" not in message
        assert everything(output_dir) == before
        return message

    return run


def everything(directory: Path) -> list[tuple[Path, int]]:
    """Every file below a directory, if there is one, with the time it was last written."""
    return sorted((path, path.lstat().st_mtime_ns) for path in directory.rglob("*")) if directory.exists() else []


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        found |= load_file(file)
    return found


def same_weights(first: Path, second: Path) -> bool:
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def metrics(output_dir: Path) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` without what depends on the clock."""
    with (output_dir / "metrics.csv").open(newline="") as handle:
        return [{key: value for key, value in row.items() if key not in TIMED} for row in csv.DictReader(handle)]


def written_again(checkpoint: Path) -> None:
    """Let a checkpoint that was changed say that it was written so."""
    write_metadata(checkpoint, read_metadata(checkpoint))


def checkpoints(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.glob("step-*"))
