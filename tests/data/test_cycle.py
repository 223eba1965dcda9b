"""Balanced validation batches: as many of every task, every conversation in its turn."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.data.cycle import TaskCycle


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 3))
@settings(deadline=None, max_examples=100)
def test_every_task_has_as_many_and_each_conversation_its_turn(sizes: list[int], per_task: int, seed: int) -> None:
    tasks = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    cycle = TaskCycle(tasks, len(sizes), per_task, seed)
    batches = [cycle.batch(number) for number in range(12)]
    for batch in batches:
        assert np.bincount(tasks[batch], minlength=len(sizes)).tolist() == [per_task] * len(sizes)
    for task, size in enumerate(sizes):
        seen = [index for batch in batches for index in batch if tasks[index] == task]
        for start in range(0, len(seen) - size + 1, size):
            assert Counter(seen[start : start + size]) == Counter(np.flatnonzero(tasks == task).tolist())


@given(st.lists(st.integers(0, 30), min_size=1, max_size=10))
@settings(deadline=None)
def test_a_batch_depends_on_its_number_alone(asked: list[int]) -> None:
    tasks = np.repeat(np.arange(3), [7, 4, 2])
    cycle = TaskCycle(tasks, 3, 3, 1)
    for number in asked:
        assert cycle.batch(number).tolist() == TaskCycle(tasks, 3, 3, 1).batch(number).tolist()


def test_orders_differ_by_seed_and_by_round() -> None:
    tasks = np.zeros(20, dtype=np.int32)
    first, second = (TaskCycle(tasks, 1, 20, 0).batch(number).tolist() for number in (0, 1))
    assert first != second != TaskCycle(tasks, 1, 20, 1).batch(1).tolist()
