"""Runs whose tasks' weights move: the same in every layout, across resumes, and in the logs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mft_lightning.cli import main
from tests.integration.conftest import metrics, same_weights, weights
from tests.integration.layouts import apart, differ, in_series

STEPS, HALF = 10, "step-00000005"
MODES = {
    "famo": ("--model.weighted_loss_mode", "famo"),
    "coba": (
        "--model.weighted_loss_mode",
        "coba",
        "--model.coba.warmup_steps",
        "3",
        "--model.coba.history_length",
        "4",
    ),
}
COMMON = ("--trainer.max_steps", str(STEPS), "--trainer.precision", "64-true", "--evaluation.strategy", "none")
COMMON += ("--checkpoint.checkpointing_steps", "5", "--checkpoint.save_total_limit", "null")
COMMON += ("--data.per_device_train_batch_size", "4")
Arguments = Callable[..., list[str]]


@pytest.fixture(scope="session")
def one_process(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one")
    for mode, words in MODES.items():
        fit(directory / mode, *COMMON, *words)
    return directory


def moved(run: Path) -> list[list[float]]:
    """The tasks' weights of every step."""
    return [[float(value) for name, value in row.items() if name.startswith("train/weight/")] for row in metrics(run)]


@pytest.mark.parametrize("mode", MODES)
def test_weights_move_keep_their_mean_and_are_logged(one_process: Path, mode: str) -> None:
    steps = moved(one_process / mode)
    assert steps[0] == [1.0, 1.0, 1.0] and steps[-1] != [1.0, 1.0, 1.0]
    assert all(sum(step) == pytest.approx(3.0) for step in steps)
    first = next(number for number, step in enumerate(steps, start=1) if step != [1.0, 1.0, 1.0])
    assert first == {"famo": 2, "coba": 4}[mode]  # the weights of a step are those of the one before it


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_every_layout_moves_them_alike(
    fit_arguments: Arguments, one_process: Path, tmp_path: Path, layout: str
) -> None:
    lines = []
    for mode, words in MODES.items():
        arguments = fit_arguments(tmp_path / mode, *COMMON, *words, "--trainer.strategy", layout)
        lines += [["fit", *arguments]]
        resumed = ("--ckpt_path", str(one_process / mode / HALF))
        lines += [
            ["fit", *fit_arguments(tmp_path / f"{mode}-on", *COMMON, *words, *resumed, "--trainer.strategy", layout)]
        ]
    in_series(2, lines, tmp_path)
    for mode in MODES:
        assert differ(metrics(one_process / mode), metrics(tmp_path / mode)) < 1e-9
        for name in (mode, f"{mode}-on"):
            assert (
                apart(weights(one_process / mode / "step-00000010"), weights(tmp_path / name / "step-00000010")) < 1e-9
            )


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_ends_with_the_same_bits(
    fit: Callable[..., Path], one_process: Path, tmp_path: Path, mode: str
) -> None:
    run = fit(tmp_path / "run", *COMMON, *MODES[mode], "--ckpt_path", str(one_process / mode / HALF))
    assert metrics(run) == metrics(one_process / mode)[5:]
    assert same_weights(run / "step-00000010", one_process / mode / "step-00000010")


def test_a_balancer_that_the_checkpoint_does_not_know_says_so(
    fit: Callable[..., Path], one_process: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path / "run", *COMMON, *MODES["famo"], "--ckpt_path", str(one_process / "coba" / HALF))
    assert "weights of tasks: famo starts anew" in capsys.readouterr().out
    assert moved(run)[0] == [1.0, 1.0, 1.0]


def test_what_coba_sees_costs_the_run_nothing_else(fit: Callable[..., Path], tmp_path: Path) -> None:
    """Within the warm-up a run with it is the run without it, dropout and all."""
    words = ("--trainer.max_steps", "3", "--evaluation.strategy", "none")
    coba = fit(tmp_path / "coba", *words, "--model.weighted_loss_mode", "coba", config="lora.yaml")
    case3 = fit(tmp_path / "case3", *words, config="lora.yaml")
    assert same_weights(coba / "step-00000003", case3 / "step-00000003")


def test_coba_needs_conversations_to_validate_on(
    fit_arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data.data_split", "100,0,0", "--evaluation.strategy", "none", *MODES["coba"])
    assert main(["fit", *fit_arguments(tmp_path / "run", *words)]) == 1
    assert "no conversation to validate text_to_code, code_explanation, unit_tests on" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
