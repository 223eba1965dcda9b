"""Properties of the plan for any lengths, seed and layout."""

from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise
from math import ceil
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.data.plan import Plan, deal_evaluation, limit_per_task
from mft_lightning.errors import UserError

LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=80).map(lambda values: np.array(values, dtype=np.int64))
SEEDS = st.integers(0, 2**32 - 1)
PLANS = st.builds(
    Plan, lengths=LENGTHS, total=st.integers(1, 40), per_device=st.integers(1, 9), packed=st.booleans(), seed=SEEDS
)
EPOCHS, WORLDS = st.integers(0, 1000), st.integers(1, 6)
checked = settings(deadline=None, max_examples=150)


def steps(plan: Plan, epoch: int = 0) -> list[np.ndarray]:
    return [plan.global_batch(epoch, step) for step in range(plan.steps_per_epoch)]


def dealt_to_all(plan: Plan, batch: np.ndarray, world: int) -> list[list[np.ndarray]]:
    return [plan.deal(batch, rank, world) for rank in range(world)]


def flat(parts: Any) -> list[int]:
    return [int(index) for part in parts for index in part]


# --- global batches


@given(plan=PLANS, epoch=EPOCHS)
@checked
def test_an_epoch_holds_every_conversation_exactly_once(plan: Plan, epoch: int) -> None:
    assert sorted(flat(steps(plan, epoch))) == list(range(len(plan.lengths)))


@given(plan=PLANS, epoch=EPOCHS)
@checked
def test_all_global_batches_but_the_last_hold_total_conversations(plan: Plan, epoch: int) -> None:
    sizes = [len(batch) for batch in steps(plan, epoch)]
    assert len(sizes) == plan.steps_per_epoch == ceil(len(plan.lengths) / plan.total)
    assert all(size == plan.total for size in sizes[:-1]) and 1 <= sizes[-1] <= plan.total


@given(plan=PLANS, epoch=EPOCHS)
@checked
def test_global_batches_depend_on_neither_the_micro_batch_nor_packing_nor_lengths(plan: Plan, epoch: int) -> None:
    other = replace(plan, lengths=plan.lengths[::-1], per_device=plan.per_device + 3, packed=not plan.packed)
    for ours, theirs in zip(steps(plan, epoch), steps(other, epoch), strict=True):
        assert ours.tolist() == theirs.tolist()


def test_epochs_and_seeds_shuffle_differently_and_each_is_repeatable() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        plan = Plan(lengths=np.ones(50, dtype=np.int64), total=7, per_device=2, packed=True, seed=seed)
        return flat(steps(plan, epoch))

    orders = [order(seed, epoch) for seed, epoch in [(1, 0), (1, 1), (2, 0), (1, 2)]]
    assert len({tuple(one) for one in orders}) == 4
    assert order(1, 0) == orders[0]


# --- dealing


@given(plan=PLANS, world=WORLDS)
@checked
def test_dealing_gives_the_global_batch_and_nothing_else_in_every_layout(plan: Plan, world: int) -> None:
    for batch in steps(plan):
        assert Counter(flat(chain(*dealt_to_all(plan, batch, world)))) == Counter(batch.tolist())


@given(plan=PLANS, world=WORLDS)
@checked
def test_every_rank_gets_the_same_number_of_micro_batches(plan: Plan, world: int) -> None:
    for batch in steps(plan):
        counts = {len(micros) for micros in dealt_to_all(plan, batch, world)}
        assert counts == {ceil(len(batch) / (world * plan.per_device))}


@given(plan=PLANS.filter(lambda plan: not plan.packed), world=WORLDS)
@checked
def test_a_padded_micro_batch_never_holds_more_than_per_device(plan: Plan, world: int) -> None:
    for batch in steps(plan):
        assert max(len(micro) for micros in dealt_to_all(plan, batch, world) for micro in micros) <= plan.per_device


@given(plan=PLANS.filter(lambda plan: not plan.packed), world=WORLDS)
@checked
def test_padded_micro_batches_hold_like_lengths_and_so_do_the_ranks_at_any_one_time(plan: Plan, world: int) -> None:
    for batch in steps(plan):
        in_time = [micro for together in zip(*dealt_to_all(plan, batch, world), strict=True) for micro in together]
        filled = [plan.lengths[micro] for micro in in_time if len(micro)]
        assert all(earlier.min() >= later.max() for earlier, later in pairwise(filled))
        assert all(len(micro) == 0 for micro in in_time[len(filled) :])


@given(plan=PLANS.filter(lambda plan: plan.packed), world=WORLDS)
@checked
def test_packed_micro_batches_differ_by_no_more_than_the_longest_conversation(plan: Plan, world: int) -> None:
    for batch in steps(plan):
        tokens = [int(plan.lengths[micro].sum()) for micros in dealt_to_all(plan, batch, world) for micro in micros]
        assert max(tokens) - min(tokens) <= plan.lengths[batch].max()


@given(plan=PLANS, world=WORLDS)
@settings(deadline=None, max_examples=50)
def test_dealing_is_repeatable_and_leaves_the_batch_as_it_is(plan: Plan, world: int) -> None:
    batch = plan.global_batch(0, 0)
    before = batch.tolist()
    first, again = dealt_to_all(plan, batch, world), dealt_to_all(plan, batch, world)
    assert [[m.tolist() for m in micros] for micros in first] == [[m.tolist() for m in micros] for micros in again]
    assert batch.tolist() == before


def test_packing_balances_a_hand_worked_batch() -> None:
    plan = Plan(lengths=np.array([9, 1, 1, 5, 4, 6]), total=6, per_device=3, packed=True, seed=0)
    tokens = sorted(int(plan.lengths[micro].sum()) for micro in plan.deal(np.arange(6), 0, 1))
    assert tokens == [13, 13]  # 9 + 4 and 6 + 5 + 1 + 1


# --- evaluation


@given(
    lengths=st.lists(st.integers(1, 500), max_size=60).map(lambda values: np.array(values, dtype=np.int64)),
    per_device=st.integers(1, 9),
    world=WORLDS,
)
@checked
def test_evaluation_covers_everything_once_over_the_ranks(lengths: np.ndarray, per_device: int, world: int) -> None:
    ranks = [deal_evaluation(lengths, per_device, rank, world) for rank in range(world)]
    assert sorted(flat(chain(*ranks))) == list(range(len(lengths)))
    assert len({len(micros) for micros in ranks}) == 1
    assert all(len(micro) <= per_device for micros in ranks for micro in micros)


TASKS = st.lists(st.integers(0, 4), max_size=60).map(lambda values: np.array(values, dtype=np.int64))


@given(tasks=TASKS, limit=st.integers(0, 12), seed=SEEDS)
@checked
def test_a_limit_keeps_as_many_of_each_task_as_there_are_and_no_more(tasks: np.ndarray, limit: int, seed: int) -> None:
    kept = limit_per_task(tasks, limit, seed)
    assert kept.tolist() == sorted(set(kept.tolist()))
    every = Counter(tasks.tolist())
    assert Counter(tasks[kept].tolist()) == Counter({task: min(limit, count) for task, count in every.items() if limit})
    assert limit_per_task(tasks, limit, seed).tolist() == kept.tolist()


@given(tasks=TASKS, seed=SEEDS)
@settings(deadline=None, max_examples=30)
def test_no_limit_keeps_all_in_order(tasks: np.ndarray, seed: int) -> None:
    assert limit_per_task(tasks, None, seed).tolist() == list(range(len(tasks)))


def test_a_limit_draws_by_the_seed_and_not_from_the_front() -> None:
    tasks = np.repeat([0, 1], 50)
    one, two = (limit_per_task(tasks, 5, seed).tolist() for seed in (1, 2))
    assert one != two and one[:5] != [0, 1, 2, 3, 4]


# --- total steps


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "expected"),
    [(3, None, 12), (3, -1, 12), (None, 5, 5), (-1, 5, 5), (3, 5, 5), (3, 50, 12), (1, 4, 4)],
)
def test_total_steps_end_at_whichever_limit_comes_first(
    max_epochs: int | None, max_steps: int | None, expected: int
) -> None:
    plan = Plan(lengths=np.ones(31, dtype=np.int64), total=8, per_device=2, packed=False, seed=0)
    assert plan.total_steps(max_epochs, max_steps) == expected


@pytest.mark.parametrize("max_epochs", [None, -1])
@pytest.mark.parametrize("max_steps", [None, -1])
def test_no_limit_of_steps_is_an_error(max_epochs: int | None, max_steps: int | None) -> None:
    plan = Plan(lengths=np.ones(31, dtype=np.int64), total=8, per_device=2, packed=False, seed=0)
    with pytest.raises(UserError, match=r"^trainer\.max_epochs: .*trainer\.max_steps"):
        plan.total_steps(max_epochs, max_steps)
