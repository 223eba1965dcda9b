"""Static weightings against a literal loop over the formulas of DESIGN.md, in Python floats."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.weighting.static import STATIC_MODES, coefficients


@dataclass(frozen=True)
class Batch:
    """The task and the supervised tokens of each conversation of a global batch, and the weight of each task."""

    tasks: list[int]
    n_supervised: list[int]
    weights: list[float]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    count = draw(st.integers(1, 6))
    conversations = draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(1, 5000)), min_size=1, max_size=30))
    raw = draw(st.lists(st.floats(0.01, 100), min_size=count, max_size=count))
    mean = sum(raw) / count
    return Batch([task for task, _ in conversations], [n for _, n in conversations], [weight / mean for weight in raw])


some_batch = given(batch=batches())
checked = settings(deadline=None, max_examples=100)


def found(mode: str, batch: Batch, rows: Sequence[int] | None = None) -> list[float]:
    """The package's coefficients of the conversations ``rows`` (default: all) of a global batch."""
    tasks, supervised = torch.tensor(batch.tasks), torch.tensor(batch.n_supervised)
    counts = torch.zeros(len(batch.weights), dtype=torch.int64)
    chosen = torch.arange(len(tasks)) if rows is None else torch.tensor(rows, dtype=torch.int64)
    result = coefficients(
        mode,
        tasks=tasks[chosen],
        n_supervised=supervised[chosen],
        task_conversations=counts.index_add(0, tasks, torch.ones_like(tasks)),
        task_supervised=counts.index_add(0, tasks, supervised),
        weights=torch.tensor(batch.weights, dtype=torch.float64),
    )
    assert result.dtype == torch.float64
    return result.tolist()


def by_the_formulas(mode: str, batch: Batch) -> list[float]:
    conversations = list(zip(batch.tasks, batch.n_supervised, strict=True))
    n_all, s_all, present = sum(batch.n_supervised), len(conversations), len(set(batch.tasks))
    result = []
    for task, n_s in conversations:
        n_k = sum(n for other, n in conversations if other == task)
        s_k = sum(1 for other, _ in conversations if other == task)
        w_k = batch.weights[task]
        result.append(
            {
                "case1": 1 / n_all,
                "case2": 1 / (s_all * n_s),
                "case3": w_k / (present * n_k),
                "case4": w_k / (present * s_k * n_s),
            }[mode]
        )
    return result


@pytest.mark.parametrize("mode", ["case1", "case2", "case3", "case4"])
@some_batch
@checked
def test_coefficients_are_those_of_the_formulas(mode: str, batch: Batch) -> None:
    assert found(mode, batch) == pytest.approx(by_the_formulas(mode, batch), rel=1e-12)


@pytest.mark.parametrize("mode", ["case1", "case2", "case3", "case4"])
@given(batch=batches(), data=st.data())
@checked
def test_a_conversations_coefficient_does_not_depend_on_the_rank_it_is_dealt_to(
    mode: str, batch: Batch, data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.sampled_from(range(len(batch.tasks))), unique=True))
    whole = found(mode, batch)
    assert found(mode, batch, rows) == [whole[row] for row in rows]


HAND_WORKED = Batch(tasks=[0, 0, 2], n_supervised=[2, 6, 4], weights=[1.0, 1.0, 1.0])  # task 1 is absent: K_b = 2


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("case1", [1 / 12, 1 / 12, 1 / 12]),
        ("case2", [1 / 6, 1 / 18, 1 / 12]),
        ("case3", [1 / 16, 1 / 16, 1 / 8]),
        ("case4", [1 / 8, 1 / 24, 1 / 8]),
    ],
)
def test_equal_weights_give_the_hand_worked_example(mode: str, expected: list[float]) -> None:
    assert found(mode, HAND_WORKED) == pytest.approx(expected, rel=1e-15)


def summed(mode: str, batch: Batch) -> float:
    return sum(c * n for c, n in zip(found(mode, batch), batch.n_supervised, strict=True))


@pytest.mark.parametrize("mode", ["case1", "case2"])
@some_batch
@checked
def test_without_task_weights_the_coefficients_sum_to_one_over_the_tokens(mode: str, batch: Batch) -> None:
    assert summed(mode, batch) == pytest.approx(1)


@pytest.mark.parametrize("mode", ["case3", "case4"])
@some_batch
@checked
def test_with_task_weights_they_sum_to_the_mean_weight_of_the_tasks_present(mode: str, batch: Batch) -> None:
    present = sorted(set(batch.tasks))
    assert summed(mode, batch) == pytest.approx(sum(batch.weights[task] for task in present) / len(present))


@pytest.mark.parametrize("mode", ["case3", "case4"])
def test_the_weight_of_a_task_alone_in_its_batch_does_not_cancel(mode: str) -> None:
    assert summed(mode, Batch([1, 1], [3, 5], [0.5, 1.5])) == pytest.approx(1.5)


def test_tasks_of_equal_size_and_weight_stay_apart() -> None:
    assert found("case3", Batch([0, 1], [5, 5], [1.0, 1.0])) == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("mode", ["case1", "case2", "case3", "case4"])
def test_a_rank_without_a_conversation_has_no_coefficient(mode: str) -> None:
    assert found(mode, HAND_WORKED, []) == []


def test_an_unknown_mode_is_refused_with_the_known_ones() -> None:
    assert STATIC_MODES == ("case1", "case2", "case3", "case4")
    with pytest.raises(ValueError, match=r"'case5'.*case1, case2, case3, case4"):
        found("case5", HAND_WORKED)
