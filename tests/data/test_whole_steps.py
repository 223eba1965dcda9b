"""Draws that fill whole steps: what they fill in epochs that are really drawn, and what stays as it was."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.data.batch_sizes import BatchSizes
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.plan import Plan
from mft_lightning.data.sampling import TaskDraws, TaskSampling
from mft_lightning.data.token_batches import count_batches
from mft_lightning.data.whole_steps import ENOUGH, in_whole_steps

NAMES = ["a", "b", "c"]
TASKS = np.repeat(np.arange(3), [6000, 3000, 1000])
RNG = np.random.default_rng(5)
LENGTHS = np.concatenate(  # of which those of one task are longer than another's
    [np.clip(RNG.lognormal(mean, 1, count), 2, 1024) for mean, count in ((5, 6000), (4, 3000), (6, 1000))]
).astype(np.int32)


def drawn(temperature: float) -> TaskDraws:
    found = TaskSampling(temperature=temperature).draws(TASKS, NAMES, 1)
    assert found is not None
    return found


def planned(draws: TaskDraws, lengths: np.ndarray, budget: int) -> Plan:
    return Plan(lengths=lengths, sizes=BatchSizes(None, 8, None, budget), packed=True, seed=3, draws=draws)


def fills(plan: Plan, epochs: int) -> np.ndarray:
    """The share of the budget that an epoch's steps hold on average, ``[epochs]``."""
    budget = plan.sizes.tokens or 0
    tokens = [
        np.minimum(plan.lengths[plan.epoch(epoch).order].astype(np.int64), budget).sum() for epoch in range(epochs)
    ]
    return np.array(tokens) / (plan.steps_per_epoch * budget)


@pytest.mark.parametrize("temperature", [1.5, 2, 5])
@pytest.mark.parametrize("steps", [1, 1.5, 2.4, 3.4, 3.6, 5, 5.3, 12.5, 24.6, 60.4, 100.5, 300.2])
def test_steps_are_filled_to_97_percent_however_many_an_epoch_has(temperature: float, steps: float) -> None:
    as_asked = drawn(temperature)
    budget = int(as_asked.typical(LENGTHS).sum() / steps)
    draws = in_whole_steps(as_asked, LENGTHS, budget)
    plan = planned(draws, LENGTHS, budget)
    assert fills(plan, 6).mean() >= 0.97
    assert abs(plan.steps_per_epoch - steps) <= max(1.01, 0.04 * steps)
    left_out = [plan.drawn - len(plan.epoch(epoch).order) for epoch in range(6)]
    assert np.mean(left_out) <= 0.005 * plan.drawn
    rates = np.array(draws.per_epoch) / plan.drawn
    assert rates == pytest.approx(np.array(as_asked.per_epoch) / len(TASKS), abs=1 / plan.drawn)
    assert abs(plan.drawn / len(TASKS) - 1) <= 1 / 3


def test_without_it_a_part_of_a_step_stays_empty() -> None:
    """Else the test above would prove nothing."""
    as_asked = drawn(2)
    budget = int(as_asked.typical(LENGTHS).sum() / 5.3)
    assert fills(planned(as_asked, LENGTHS, budget), 6).mean() < 0.9


def test_conversations_that_are_all_drawn_once_stay_so() -> None:
    """As at temperature 1."""
    as_asked = drawn(1)
    assert as_asked.per_epoch == (6000, 3000, 1000)
    assert in_whole_steps(as_asked, LENGTHS, int(LENGTHS.sum() / 5.3)) is as_asked


def test_more_draws_come_before_fewer_and_a_small_task_keeps_its_one() -> None:
    lengths = np.full(1000, 10)
    members = tuple(np.split(np.arange(1000, dtype=np.int32), [995]))
    as_asked = TaskDraws(members=members, per_epoch=(999, 1), seed=1)
    draws = in_whole_steps(as_asked, lengths, 4000)  # which are two and a half steps, so three or two could be full
    assert draws.per_epoch == (1187, 1)
    assert as_asked.resized(100).per_epoch == (100, 1)


@given(
    lengths=st.lists(st.integers(1, 3000), min_size=3, max_size=60).map(np.array),
    budget=st.integers(1, 50_000),
    data=st.data(),
)
@settings(deadline=None, max_examples=200)
def test_whatever_there_is_the_rates_stay_and_an_epoch_is_formed(
    lengths: np.ndarray, budget: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(lengths) - 1))
    share = data.draw(st.integers(1, len(lengths) - 1))
    members = tuple(np.split(np.arange(len(lengths), dtype=np.int32), [cut]))
    as_asked = TaskDraws(members=members, per_epoch=(share, len(lengths) - share), seed=1)
    draws = in_whole_steps(as_asked, lengths, budget)
    total = sum(draws.per_epoch)
    assert draws.members is as_asked.members and draws.seed == as_asked.seed
    assert abs(total / len(lengths) - 1) <= 1 / 3 and min(draws.per_epoch) >= 1
    for found, asked in zip(draws.per_epoch, as_asked.per_epoch, strict=True):
        assert abs(found - total * asked / len(lengths)) <= 1
    plan = planned(draws, lengths, budget)
    order = plan.epoch(3).order
    assert len(order) <= total and plan.steps_per_epoch == len(plan.epoch(3).bounds) - 1
    if draws is not as_asked:
        typical = draws.typical(lengths)
        assert np.minimum(typical, budget).sum() >= ENOUGH * count_batches(typical, budget) * budget


@pytest.mark.parametrize(
    ("lengths", "budget"),
    [(LENGTHS, 1 << 40), (LENGTHS, 4_000_000), (np.full(10_000, 90, np.int32), 200), (LENGTHS, 2)],
    ids=["next to nothing of a step", "half a step", "two conversations a step", "each alone"],
)
def test_draws_stay_where_no_small_change_fills_steps(lengths: np.ndarray, budget: int) -> None:
    as_asked = drawn(2)
    assert in_whole_steps(as_asked, lengths, budget) is as_asked


@pytest.mark.parametrize("budget", [2048, 16384, 131072])
def test_a_run_at_rates_fills_a_token_budget(real_tasks: list[str], pythia: Path, budget: int) -> None:
    data = MFTDataModule(
        data_paths=real_tasks,
        tokenizer_path=str(pythia),
        seq_length=1024,
        total_train_batch_tokens=budget,
        task_sampling={"temperature": 2},
    )
    assert fills(data.plan, 12).mean() >= 0.97
    by_size = MFTDataModule(
        data_paths=real_tasks, tokenizer_path=str(pythia), seq_length=1024, task_sampling={"temperature": 2}
    )
    assert by_size.plan.drawn == len(data.table("train"))
