"""Validation batches that hold the same number of conversations of every task, for as long as they are asked for."""

from __future__ import annotations

import numpy as np


class TaskCycle:
    """Each task's conversations in an order of their own, shuffled anew whenever all of them were seen.

    A pure function of (seed, tasks, number of the batch): to go on with it one needs that number alone.

    Args:
        tasks: of the conversations, ``int32 [conversations]``; every number below ``count`` must be there.
        count: how many tasks there are.
        per_task: conversations of each in a batch; where a task has fewer, it has some of them more than once.
        seed: of the orders.
    """

    def __init__(self, tasks: np.ndarray, count: int, per_task: int, seed: int) -> None:
        self.per_task, self.seed = per_task, seed
        self._own = [np.flatnonzero(tasks == task) for task in range(count)]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # the last one of each task, and which it is

    def batch(self, number: int) -> np.ndarray:
        """Indices of the conversations of the ``number``-th batch (from 0), task after task."""
        parts: list[int] = []
        for task, own in enumerate(self._own):
            for place in range(number * self.per_task, (number + 1) * self.per_task):
                cycle, within = divmod(place, len(own))
                parts.append(own[self._order(task, cycle)[within]])
        return np.array(parts, dtype=np.int64)

    def _order(self, task: int, cycle: int) -> np.ndarray:
        if task not in self._orders or self._orders[task][0] != cycle:
            generator = np.random.default_rng([self.seed, task, cycle])
            self._orders[task] = (cycle, generator.permutation(len(self._own[task])))
        return self._orders[task][1]
