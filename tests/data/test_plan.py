"""Properties of the plan for any lengths, seed and layout."""

import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain, combinations, pairwise
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.data.batch_sizes import BatchSizes
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.plan import Plan, deal_evaluation, limit_per_task
from mft_lightning.data.sampling import TaskDraws
from mft_lightning.errors import UserError
from tests.conftest import ROOT

LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=80).map(lambda values: np.array(values, dtype=np.int64))
SEEDS = st.integers(0, 2**32 - 1)
COUNTED = st.builds(BatchSizes, total=st.integers(1, 40), per_device=st.integers(1, 9), accumulation=st.none())
TOKENS = st.integers(1, 20_000)
BUDGETED = st.builds(BatchSizes, st.none(), st.integers(1, 9), st.none(), TOKENS) | st.builds(
    BatchSizes, st.none(), st.none(), st.integers(1, 5), TOKENS
)
EPOCHS, WORLDS = st.integers(0, 1000), st.integers(1, 6)
checked = settings(deadline=None, max_examples=150)


@st.composite
def draws_of(draw: st.DrawFn, conversations: int) -> TaskDraws:
    """Conversations in at most three tasks, drawn at rates that leave none of them out."""
    numbers = draw(st.lists(st.integers(0, 2), min_size=conversations, max_size=conversations))
    members = tuple(found for task in range(3) if len(found := np.flatnonzero(np.array(numbers) == task)))
    cuts = draw(st.permutations(range(1, conversations)).map(lambda cuts: sorted(cuts[: len(members) - 1])))
    per_epoch = tuple(np.diff([0, *cuts, conversations]).tolist())
    return TaskDraws(members=members, per_epoch=per_epoch, seed=draw(SEEDS))


@st.composite
def plans(
    draw: st.DrawFn, sizes: st.SearchStrategy[BatchSizes], drawn: bool = False, packed: bool | None = None
) -> Plan:
    lengths = draw(LENGTHS)
    return Plan(
        lengths=lengths,
        sizes=draw(sizes),
        packed=draw(st.booleans()) if packed is None else packed,
        seed=draw(SEEDS),
        draws=draw(draws_of(len(lengths))) if drawn else None,
    )


PLANS = plans(COUNTED)
ALL_PLANS = plans(COUNTED) | plans(BUDGETED) | plans(COUNTED, drawn=True) | plans(BUDGETED, drawn=True)
ALL_SIZES = COUNTED | BUDGETED


def steps(plan: Plan, epoch: int = 0) -> list[np.ndarray]:
    return [plan.global_batch(epoch, step) for step in range(plan.steps_per_epoch)]


def dealt_to_all(plan: Plan, batch: np.ndarray, world: int) -> list[list[np.ndarray]]:
    return [plan.deal(batch, rank, world) for rank in range(world)]


def flat(parts: Any) -> list[int]:
    return [int(index) for part in parts for index in part]


# --- global batches


@given(plan=plans(COUNTED) | plans(BUDGETED), epoch=EPOCHS)
@checked
def test_an_epoch_holds_every_conversation_exactly_once(plan: Plan, epoch: int) -> None:
    assert sorted(flat(steps(plan, epoch))) == list(range(len(plan.lengths)))


@given(plan=PLANS, epoch=EPOCHS)
@checked
def test_all_global_batches_but_the_last_hold_total_conversations(plan: Plan, epoch: int) -> None:
    sizes = [len(batch) for batch in steps(plan, epoch)]
    assert len(sizes) == plan.steps_per_epoch == ceil(len(plan.lengths) / (plan.sizes.total or 0))
    assert all(size == plan.sizes.total for size in sizes[:-1]) and 1 <= sizes[-1] <= (plan.sizes.total or 0)


@given(plan=ALL_PLANS, sizes=ALL_SIZES, epoch=EPOCHS, worlds=st.tuples(WORLDS, WORLDS))
@checked
def test_every_layout_has_the_same_conversations_in_every_global_batch(
    plan: Plan, sizes: BatchSizes, epoch: int, worlds: tuple[int, int]
) -> None:
    layout = replace(sizes, total=plan.sizes.total, tokens=plan.sizes.tokens)
    other = replace(plan, sizes=layout, packed=not plan.packed)
    for ours, theirs in zip(steps(plan, epoch), steps(other, epoch), strict=True):
        first = Counter(flat(chain(*dealt_to_all(plan, ours, worlds[0]))))
        assert first == Counter(flat(chain(*dealt_to_all(other, theirs, worlds[1]))))
        assert first == Counter(ours.tolist()) and len(ours) >= 1


@given(plan=ALL_PLANS, data=st.data(), worlds=st.tuples(WORLDS, WORLDS))
@checked
def test_resuming_at_any_step_on_another_number_of_ranks_continues_the_sequence(
    plan: Plan, data: st.DataObject, worlds: tuple[int, int]
) -> None:
    def sequence(plan: Plan, world: int, start: int, end: int) -> list[Counter[int]]:
        places = (divmod(step, plan.steps_per_epoch) for step in range(start, end))
        batches = (plan.global_batch(*place) for place in places)
        return [Counter(flat(chain(*dealt_to_all(plan, batch, world)))) for batch in batches]

    end = 2 * plan.steps_per_epoch + 1
    stop = data.draw(st.integers(0, end))
    begun = sequence(plan, worlds[0], 0, stop)
    resumed = sequence(pickle.loads(pickle.dumps(plan)), worlds[1], stop, end)
    assert begun + resumed == sequence(replace(plan), 1, 0, end)


@given(plan=PLANS, epoch=EPOCHS)
@checked
def test_counted_batches_do_not_depend_on_lengths(plan: Plan, epoch: int) -> None:
    other = replace(plan, lengths=plan.lengths[::-1])
    assert [batch.tolist() for batch in steps(plan, epoch)] == [batch.tolist() for batch in steps(other, epoch)]


def test_the_order_of_an_epoch_stays_what_runs_were_begun_with() -> None:
    plan = Plan(lengths=np.ones(12, dtype=np.int64), sizes=BatchSizes(5, 2, None), packed=True, seed=42)
    assert [batch.tolist() for batch in steps(plan, 1)] == [[0, 7, 4, 9, 8], [3, 1, 2, 10, 6], [5, 11]]
    assert plan.epoch(1).order.tolist() == np.random.default_rng([42, 1]).permutation(12).tolist()


# --- drawn at rates


@given(plan=plans(COUNTED, drawn=True), epoch=EPOCHS)
@checked
def test_an_epoch_holds_the_draws_of_each_task_in_another_order(plan: Plan, epoch: int) -> None:
    assert plan.draws is not None
    assert Counter(flat(steps(plan, epoch))) == Counter(plan.draws.drawn(epoch).tolist())


def test_tasks_are_mixed_over_the_epoch() -> None:
    draws = TaskDraws(members=(np.arange(100), np.arange(100, 200)), per_epoch=(100, 100), seed=1)
    plan = Plan(lengths=np.ones(200, dtype=np.int64), sizes=BatchSizes(50, 8, None), packed=True, seed=1, draws=draws)
    assert all(10 < sum(batch < 100) < 40 for batch in steps(plan))


# --- token budgets


def loads(plan: Plan, epoch: int = 0) -> np.ndarray:
    return np.array([plan.lengths[batch].sum() for batch in steps(plan, epoch)])


@given(plan=plans(BUDGETED) | plans(BUDGETED, drawn=True), epoch=EPOCHS)
@checked
def test_no_step_exceeds_the_budget_but_a_conversation_that_is_longer_and_stands_alone(plan: Plan, epoch: int) -> None:
    batches = steps(plan, epoch)
    assert len(batches) == plan.steps_per_epoch
    for batch in batches:
        assert len(batch) == 1 or (len(batch) > 1 and plan.lengths[batch].sum() <= (plan.sizes.tokens or 0))


@given(plan=plans(BUDGETED, drawn=True), epoch=EPOCHS)
@checked
def test_what_does_not_fit_of_the_draws_is_left_out_and_nothing_else_comes_in(plan: Plan, epoch: int) -> None:
    assert plan.draws is not None
    assert Counter(flat(steps(plan, epoch))) <= Counter(plan.draws.drawn(epoch).tolist())
    assert plan.left_out == sum(plan.draws.per_epoch) - len(flat(steps(plan, 0)))


def lognormal(count: int, longest: int = 1024) -> np.ndarray:
    values = np.random.default_rng(5).lognormal(5, 1, count)
    return np.clip(values, 2, longest).astype(np.int64)


@pytest.mark.parametrize("budget", [2048, 4096, 16384])
def test_lognormal_lengths_fill_the_budget_in_every_epoch(budget: int) -> None:
    plan = Plan(lengths=lognormal(20_000), sizes=BatchSizes(None, 8, None, budget), packed=True, seed=3)
    for epoch in range(3):
        tokens = loads(plan, epoch)
        assert tokens.mean() >= 0.97 * budget and tokens.max() <= budget
        assert epoch or plan.fill == pytest.approx(tokens.mean() / budget)


def test_a_budget_of_any_size_makes_one_step() -> None:
    plan = Plan(lengths=np.full(10, 5, np.int32), sizes=BatchSizes(None, 8, None, 10**13), packed=True, seed=3)
    assert plan.steps_per_epoch == 1 and len(plan.global_batch(0, 0)) == 10 and plan.fill == 5e-12


def test_drawn_at_rates_nearly_all_is_seen_and_the_budget_filled() -> None:
    lengths = np.concatenate([lognormal(6000), lognormal(3000) // 4 + 1, lognormal(1000, longest=800)])
    members = tuple(np.split(np.arange(10_000), [6000, 9000]))
    draws = TaskDraws(members=members, per_epoch=(2000, 2000, 6000), seed=3)
    plan = Plan(lengths=lengths, sizes=BatchSizes(None, 8, None, 8192), packed=True, seed=3, draws=draws)
    for epoch in range(5):
        tokens = loads(plan, epoch)
        assert tokens.max() <= 8192 and tokens.mean() >= 0.96 * 8192
        assert len(plan.epoch(epoch).order) >= 9800


def test_of_draws_that_do_not_fit_as_few_as_can_be_are_left_out() -> None:
    lengths = np.full(10_000, 10)
    draws = TaskDraws(members=(np.arange(10_000),), per_epoch=(10_000,), seed=3)
    sizes = BatchSizes(None, 8, None, 1000)
    plan = Plan(lengths=lengths, sizes=sizes, packed=True, seed=3, draws=draws)
    plan.__dict__["steps_per_epoch"] = 93  # which hold 9,300
    assert 9290 <= len(plan.epoch(0).order) <= 9300
    uneven = np.where(np.arange(10_000) % 4, 10, 400)
    plan = Plan(lengths=uneven, sizes=sizes, packed=True, seed=3, draws=draws)
    plan.__dict__["steps_per_epoch"] = 1000  # of the 1,250 that they need, two of 400 to each
    kept = plan.epoch(0).order
    order = draws.drawn(0)[np.random.default_rng([3, 0]).permutation(np.arange(10_000, dtype=np.int32))]
    first_without_room = int(np.searchsorted(np.cumsum(uneven[order] == 400), 2000, side="right"))
    assert first_without_room - 10 <= len(kept) <= first_without_room


def test_steps_by_conversations_are_as_many_as_the_draws_need() -> None:
    draws = TaskDraws(members=(np.arange(100),), per_epoch=(90,), seed=3)
    plan = Plan(lengths=np.full(100, 7), sizes=BatchSizes(10, 2, None), packed=True, seed=3, draws=draws)
    assert [len(batch) for batch in steps(plan)] == [10] * 9


def test_real_lengths_fill_the_budget(real_tasks: list[str], pythia: Path) -> None:
    data = MFTDataModule(
        data_paths=real_tasks, tokenizer_path=str(pythia), seq_length=1024, total_train_batch_tokens=16384
    )
    for epoch in range(3):
        tokens = loads(data.plan, epoch)
        assert tokens.mean() >= 0.97 * 16384 and tokens.max() <= 16384
    assert len(data.plan.epoch(0).order) == len(data.table("train"))


def test_epochs_bring_other_conversations_together() -> None:
    plan = Plan(lengths=lognormal(2000), sizes=BatchSizes(None, 8, None, 8192), packed=True, seed=3)

    def together(epoch: int) -> set[tuple[int, int]]:
        return {pair for batch in steps(plan, epoch) for pair in combinations(sorted(batch.tolist()), 2)}

    first, second = together(0), together(1)
    by_chance = len(first) / (2000 * 1999 / 2)
    assert len(first & second) / len(first) < 3 * by_chance


def test_the_batches_of_an_epoch_come_in_no_order_of_length() -> None:
    lengths = np.array([*range(2001, 2101), *[100] * 100], dtype=np.int64)
    plan = Plan(lengths=lengths, sizes=BatchSizes(None, 8, None, 2000), packed=True, seed=3)
    tokens = loads(plan)
    alone = tokens > 2000
    assert alone.sum() == 100 and len(tokens) == 105
    assert tokens[alone].tolist() != sorted(tokens[alone]) and not alone[:100].all() and not alone[5:].all()


@pytest.mark.parametrize("packed", [True, False])
def test_a_step_of_tokens_is_cut_into_as_many_micro_batches_as_asked(packed: bool) -> None:
    plan = Plan(lengths=lognormal(500), sizes=BatchSizes(None, None, 3, 4096), packed=packed, seed=3)
    batch = plan.global_batch(0, 0)
    for world in (1, 2):
        ranks = dealt_to_all(plan, batch, world)
        assert [len(micros) for micros in ranks] == [3] * world
    if packed:
        tokens = [plan.lengths[micro].sum() for micro in plan.deal(batch, 0, 1)]
        assert max(tokens) < 1.1 * min(tokens)


# --- at hand


def test_an_epoch_is_formed_once_and_does_not_travel_to_other_processes() -> None:
    plan = Plan(lengths=lognormal(50_000), sizes=BatchSizes(None, 8, None, 8192), packed=True, seed=3)
    formed = plan.epoch(1)
    assert plan.epoch(1) is formed
    sent = pickle.dumps(plan)
    assert len(sent) < 1.1 * plan.lengths.nbytes
    assert pickle.loads(sent).epoch(1).order.tolist() == formed.order.tolist()


def test_planning_needs_no_torch() -> None:
    code = "import sys, mft_lightning.data.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_epochs_and_seeds_shuffle_differently_and_each_is_repeatable() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        plan = Plan(lengths=np.ones(50, dtype=np.int64), sizes=BatchSizes(7, 2, None), packed=True, seed=seed)
        return flat(steps(plan, epoch))

    orders = [order(seed, epoch) for seed, epoch in [(1, 0), (1, 1), (2, 0), (1, 2)]]
    assert len({tuple(one) for one in orders}) == 4
    assert order(1, 0) == orders[0]


# --- dealing


@given(plan=ALL_PLANS, world=WORLDS)
@checked
def test_dealing_gives_the_global_batch_and_nothing_else_in_every_layout(plan: Plan, world: int) -> None:
    for batch in steps(plan):
        assert Counter(flat(chain(*dealt_to_all(plan, batch, world)))) == Counter(batch.tolist())


@given(plan=PLANS, world=WORLDS)
@checked
def test_every_rank_gets_the_same_number_of_micro_batches(plan: Plan, world: int) -> None:
    for batch in steps(plan):
        counts = {len(micros) for micros in dealt_to_all(plan, batch, world)}
        assert counts == {ceil(len(batch) / (world * (plan.sizes.per_device or 0)))}


@given(plan=plans(COUNTED, packed=False), world=WORLDS)
@checked
def test_a_padded_micro_batch_never_holds_more_than_per_device(plan: Plan, world: int) -> None:
    for batch in steps(plan):
        largest = max(len(micro) for micros in dealt_to_all(plan, batch, world) for micro in micros)
        assert largest <= (plan.sizes.per_device or 0)


@given(plan=plans(COUNTED, packed=False), world=WORLDS)
@checked
def test_padded_micro_batches_hold_like_lengths_and_so_do_the_ranks_at_any_one_time(plan: Plan, world: int) -> None:
    for batch in steps(plan):
        in_time = [micro for together in zip(*dealt_to_all(plan, batch, world), strict=True) for micro in together]
        filled = [plan.lengths[micro] for micro in in_time if len(micro)]
        assert all(earlier.min() >= later.max() for earlier, later in pairwise(filled))
        assert all(len(micro) == 0 for micro in in_time[len(filled) :])


@given(plan=plans(ALL_SIZES, packed=True), world=WORLDS)
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
    plan = Plan(lengths=np.array([9, 1, 1, 5, 4, 6]), sizes=BatchSizes(6, 3, None), packed=True, seed=0)
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
    plan = Plan(lengths=np.ones(31, dtype=np.int64), sizes=BatchSizes(8, 2, None), packed=False, seed=0)
    assert plan.total_steps(max_epochs, max_steps) == expected


@pytest.mark.parametrize("max_epochs", [None, -1])
@pytest.mark.parametrize("max_steps", [None, -1])
def test_no_limit_of_steps_is_an_error(max_epochs: int | None, max_steps: int | None) -> None:
    plan = Plan(lengths=np.ones(31, dtype=np.int64), sizes=BatchSizes(8, 2, None), packed=False, seed=0)
    with pytest.raises(UserError, match=r"^trainer\.max_epochs: .*trainer\.max_steps"):
        plan.total_steps(max_epochs, max_steps)
