"""benchmarks/train_throughput.py on a tiny model: who takes part, whether losses agree, and what the table says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks import train_throughput
from benchmarks.throughput import comparing
from benchmarks.throughput.contenders import OURS, Contender
from benchmarks.throughput.table import Work, make_row, summary
from benchmarks.throughput.turns import Ended, Measured, Paused

Suite = Callable[..., tuple[int, dict[str, dict[str, Any]]]]


@pytest.fixture
def suite(tiny_model: Path, example_tasks: list[str], tmp_path: Path) -> Suite:
    """Run the suite; its exit code, and its rows by the contenders' names."""

    def run(*words: str) -> tuple[int, dict[str, dict[str, Any]]]:
        given = ["--model", str(tiny_model), "--data", *example_tasks, "--seq-length", "256", "--conversations", "6"]
        given += ["--warm-up", "0", "--rounds", "2", "--threads", "1", "--json", str(tmp_path / "rows.json")]
        code = train_throughput.main([*given, "--peers-python", sys.executable, *words])
        return code, {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}

    return run


def test_losses_are_those_of_transformers_trainer(suite: Suite, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--method", "lora", "--precision", "32-true", "--micro-batches", "2"]
    code, rows = suite(*words, "--only", f"{OURS}, packed", "Trainer, packed", "litgpt")
    assert code == 0
    assert rows["Trainer, packed"]["loss_off"] < 1e-5
    for name in (f"{OURS}, packed", "Trainer, packed"):
        row = rows[name]
        assert row["tokens"] > row["supervised"] > 0 and row["peak_mib"] > 100 and row["gemm_share"] > 0
    assert rows["litgpt, padded"]["note"] == "left out: no --litgpt-python was given"
    said = capfd.readouterr().out
    assert "| litgpt, padded | lora |  | left out: no --litgpt-python was given |" in said
    assert f"| {OURS}, packed | lora | 32-true |" in said and "| lora, 32-true: packed |" in said


def test_trl_in_each_of_its_settings(suite: Suite) -> None:
    pytest.importorskip("trl", reason="TRL is in an environment of its own (benchmarks/peers.txt)")
    code, rows = suite("--method", "full", "--precision", "32-true", "--only", f"{OURS}, packed", "TRL")
    assert code == 0 and len(rows) == 4
    assert all(row["loss_off"] < 1e-5 for row in rows.values())


def measured(name: str, seconds: list[float], losses: list[float], gemm: list[float], peak: int = 2**30) -> Measured:
    program, _, setting = name.partition(", ")
    return Measured(Contender(program, setting, "full", "32-true"), seconds, gemm, losses, peak)


WORK = Work(tokens=[100, 200, 100], supervised=[50, 50, 50], flops=[10**9, 2 * 10**9, 10**9])


def test_figures_are_medians_of_rounds() -> None:
    ours = measured(f"{OURS}, packed", [1.0, 4.0, 2.0], [3.0, 2.0, 1.0], [1e9, 2e9, 1e9], 2**29)
    other = measured("TRL, padded", [2.0, 4.0, 8.0], [3.0, 2.0, 1.00001], [1e9, 1e9, 0.25e9])
    row = make_row(other, ours, WORK, ours.losses)
    assert (row.seconds, row.tokens, row.supervised, row.gflops) == (4.0, 50.0, 12.5, 0.5)
    assert row.slower == 2.0  # of 2, 1 and 4; the medians' ratio is 2 as well, that of their sums is not
    assert row.gemm_share == 0.5 and row.memory == 2.0 and row.note == ""
    mine = make_row(ours, ours, WORK, ours.losses)
    assert summary([mine, row])[2] == "| full, 32-true: packed | 2.00, 50% (padded) | 50% |"


def test_another_loss_does_not_count() -> None:
    ours = measured(f"{OURS}, packed", [2.0, 2.0, 2.0], [3.0, 2.0, 1.0], [1e9] * 3)
    for losses in ([3.0, 2.0, 1.001], [3.0, float("nan"), 1.0]):
        other = measured("TRL, padded", [1.0, 1.0, 1.0], losses, [1e9] * 3)
        row = make_row(other, ours, WORK, ours.losses)
        assert row.note == "other loss"
        assert "TRL" not in summary([make_row(ours, ours, WORK, ours.losses), row])[2]


def test_another_loss_ends_with_exit_code_1(suite: Suite) -> None:
    def turns(contenders: list[Contender], *given: Any, **more: Any) -> list[Measured]:
        found = [measured(contender.name, [1.0, 1.0], [3.0, 2.0], [1e9, 1e9]) for contender in contenders]
        found[-1].losses = [3.0, 2.001]
        return found

    with patch.object(comparing, "take_turns", turns):
        code, rows = suite("--method", "full", "--precision", "32-true", "--only", f"{OURS}, packed", "Trainer, padded")
    assert code == 1
    assert rows["Trainer, padded"]["note"] == "other loss" and rows[f"{OURS}, packed"]["note"] == ""


def test_last_words_of_a_contender_that_fails(tmp_path: Path) -> None:
    with Paused(sys.executable, ["-c", "raise SystemExit('no such thing')"], 1, tmp_path / "log") as process:
        with pytest.raises(Ended, match="no such thing"):
            process.wait()
        with pytest.raises(Ended):
            process.step()
