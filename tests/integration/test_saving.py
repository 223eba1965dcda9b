"""Saving does not hold training up, and what is saved is what was, not what has become of it meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mft_lightning.model.export import ModelWriter
from tests.integration.conftest import checkpoints, metrics, same_weights
from tests.integration.layouts import in_series

EVERY_OTHER = ("--checkpoint.checkpointing_steps", "2", "--checkpoint.save_total_limit", "null")
EVERY_OTHER += ("--trainer.max_steps", "6", "--evaluation.steps", "3")
LATE = ("--trainer.callbacks+=tests.integration.faults.LateWrites", "--trainer.callbacks.seconds", "0.5")


def assert_same_checkpoints(run: Path, other: Path) -> None:
    """Weights and trainer's states of all of them, and the curves."""
    assert checkpoints(run) == checkpoints(other) == [f"step-{step:08d}" for step in (2, 3, 4, 6)]
    for name in checkpoints(run):
        assert same_weights(run / name, other / name), name
        ours, theirs = (torch.load(path / name / "trainer.pt", weights_only=True) for path in (run, other))
        assert str(ours) == str(theirs), name
    assert metrics(run) == metrics(other)


@pytest.mark.parametrize("config", ["full.yaml", "lora.yaml"])
def test_what_is_written_late_is_what_was_to_be_saved(fit: Callable[..., Path], tmp_path: Path, config: str) -> None:
    """A write takes longer than the steps until the next one, which change the weights in place."""
    balanced = ("--model.weighted_loss_mode", "famo")
    at_once = fit(tmp_path / "at_once", *EVERY_OTHER, *balanced, config=config)
    late = fit(tmp_path / "late", *EVERY_OTHER, *balanced, *LATE, config=config)
    assert_same_checkpoints(late, at_once)


def test_so_it_is_on_several_ranks(fit_arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    lines = [
        fit_arguments(tmp_path / name, *EVERY_OTHER, "--trainer.strategy", strategy, *words, config="ddp.yaml")
        for strategy in ("ddp", "fsdp")
        for name, words in ((f"{strategy}-at-once", ()), (f"{strategy}-late", LATE))
    ]
    in_series(2, [["fit", *line] for line in lines], tmp_path)
    for strategy in ("ddp", "fsdp"):
        assert_same_checkpoints(tmp_path / f"{strategy}-late", tmp_path / f"{strategy}-at-once")


def test_training_goes_on_while_a_checkpoint_is_written(
    fit: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step after the one that is saved is logged while its checkpoint is still in the making."""
    write, steps = ModelWriter.__call__, tmp_path / "run" / "metrics.csv"
    seen: list[str] = []

    def slow(*given: object) -> None:
        deadline = time.monotonic() + 30
        while len(steps.read_text().splitlines()) < 1 + 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(steps.read_text().splitlines()[-1].partition(",")[0])
        write(*given)

    monkeypatch.setattr(ModelWriter, "__call__", slow)
    words = ("--checkpoint.checkpointing_steps", "4", "--evaluation.strategy", "none")
    fit(tmp_path / "run", *words, "--trainer.max_steps", "6")
    assert seen == ["5", "6"]
