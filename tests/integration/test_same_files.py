"""Hosts that do not see the same files go on together from nowhere, and lose no part of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.integration import preloaded
from tests.integration.conftest import checkpoints, user_environment

Run = Callable[..., CompletedProcess[str]]
SHARDED = ("--trainer.strategy", "fsdp", "--checkpoint.sharded", "true")


@pytest.fixture
def run(fit_arguments: Callable[..., list[str]], tmp_path: Path) -> Run:
    """``fit`` on two ranks, one command after the other; each has an output directory of its own, by its number."""
    (tmp_path / "own.yaml").write_text(f"output_dir: {tmp_path}/${{RANK}}\n")

    def series(*lines: tuple[str, ...]) -> CompletedProcess[str]:
        few = ("--evaluation.strategy", "none", "--checkpoint.checkpointing_steps", "2")
        begin = fit_arguments(tmp_path, config="full.yaml")
        at = begin.index("--output_dir")
        begin[at : at + 2] = ["--config", str(tmp_path / "own.yaml")]
        (tmp_path / "commands.json").write_text(json.dumps([["fit", *begin, *few, *line] for line in lines]))
        words = ["tests/integration/in_series.py", str(tmp_path / "commands.json")]
        return preloaded.run_on_ranks(2, words, user_environment())

    return series


def told(done: CompletedProcess[str]) -> str:
    assert done.returncode, done.stdout
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return message


@pytest.mark.parametrize("steps", ["4", "2"])  # there is more to do, or nothing for the host that has it
def test_a_checkpoint_that_one_host_alone_has_is_gone_on_from_by_none(run: Run, tmp_path: Path, steps: str) -> None:
    ddp = ("--trainer.strategy", "ddp", "--trainer.max_steps")
    message = told(run((*ddp, "2"), (*ddp, steps, "--ckpt_path", "last")))
    assert message.startswith("error: rank 1: --ckpt_path: the host ")
    assert "would begin at step 0, another at step 2: they do not see the same checkpoints." in message
    assert checkpoints(tmp_path / "0") == ["step-00000002"] and not (tmp_path / "1").exists()


def test_parts_of_a_checkpoint_are_not_written_to_files_that_the_first_rank_does_not_see(
    run: Run, tmp_path: Path
) -> None:
    message = told(run((*SHARDED, "--trainer.max_steps", "2")))
    assert message.startswith("error: rank 1: checkpoint.sharded: the host ")
    assert f"does not see {tmp_path}/1 of the first rank" in message
    assert not (tmp_path / "0" / "config.yaml").exists() and not (tmp_path / "1").exists()
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / ".lock").touch()  # of a run that was killed there when that host was the first
    message = told(run((*SHARDED, "--trainer.max_steps", "4")))
    assert f"{tmp_path}/1/step-00000002: the checkpoint cannot be written" in message
    assert "is not seen on the host " in message
    assert checkpoints(tmp_path / "0") == [] and not list((tmp_path / "1").glob(".step*"))
