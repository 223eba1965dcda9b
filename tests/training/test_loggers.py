"""metrics.csv goes on where the resumed run does."""

from __future__ import annotations

import csv
from pathlib import Path

from mft_lightning.training.loggers import MetricsCSV


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_rows_after_the_resumed_step_are_cut_and_new_columns_added(tmp_path: Path) -> None:
    file = tmp_path / "out" / "metrics.csv"
    first = MetricsCSV(file, 0)
    first.log_metrics({"a": 1.5}, 1)
    first.log_metrics({"b": 2.0}, 2)
    first.log_metrics({"a": 3.0}, 3)
    second = MetricsCSV(file, 2)
    second.log_metrics({"a": 4.0, "c": 5.0}, 3)
    assert rows(file) == [
        {"step": "1", "a": "1.5", "b": "", "c": ""},
        {"step": "2", "a": "", "b": "2.0", "c": ""},
        {"step": "3", "a": "4.0", "b": "", "c": "5.0"},
    ]


def test_a_run_that_starts_again_at_zero_starts_the_file_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    MetricsCSV(file, 0).log_metrics({"a": 1.0}, 1)
    MetricsCSV(file, 0).log_metrics({"a": 2.0}, 1)
    assert [row["a"] for row in rows(file)] == ["2.0"]
