"""What a line says of the losses of any number of tasks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from mft_lightning.training.task_losses import MOST, in_a_line, of_tasks


def test_few_tasks_are_all_there_in_their_order() -> None:
    assert in_a_line({"b": 1.0, "a": 2.25}) == "b 1.0000  a 2.2500"
    assert in_a_line({}) == ""


def test_of_many_tasks_the_highest_and_the_lowest_are_there() -> None:
    line = in_a_line({f"t{number}": float(number % 100) for number in range(300)})
    assert line.startswith("highest t99 99.0000  t199 99.0000  t299 99.0000  t98 98.0000")
    assert line.endswith("lowest t200 0.0000  of 300 tasks") and line.count(".0000") == MOST


def test_metrics_of_other_kinds_are_none_of_the_tasks() -> None:
    metrics = {"train/loss": 1, "train/loss/a": 2, "train/loss/b/c": 3, "val/loss/a": 4}
    assert of_tasks(metrics, "train/loss") == {"a": 2, "b/c": 3}


@given(st.dictionaries(st.text("ab語", min_size=1, max_size=30), st.floats(0, 1e3), max_size=40), st.integers(1, 300))
def test_a_line_is_never_wider_than_it_may_be(losses: dict[str, float], width: int) -> None:
    line = in_a_line(losses, width)
    assert cell_len(line) <= width
    if not losses or cell_len(in_a_line(losses)) <= width:
        assert line == in_a_line(losses)


@pytest.mark.parametrize(("width", "highest"), [(80, "task8 0.8000  task7 0.7000"), (60, "task8 0.8000"), (40, "")])
def test_what_does_not_fit_is_less_of_the_same(width: int, highest: str) -> None:
    line = in_a_line({f"task{number}": number / 10 for number in range(1, 9)}, width)
    assert line == (f"highest {highest}  lowest task1 0.1000  of 8 tasks" if highest else "")
