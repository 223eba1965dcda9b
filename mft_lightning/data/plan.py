"""The plan: which conversations an optimizer step sees, and how they are dealt to ranks and micro-batches.

Everything here is a pure function of (seed, epoch, step, lengths, tasks): global batches are formed first and do not
know how many devices there are; dealing them out changes who computes what, never what is learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heapreplace
from math import ceil
from typing import Any

import numpy as np

from mft_lightning.data.batch_sizes import BatchSizes
from mft_lightning.data.sampling import TaskDraws
from mft_lightning.data.token_batches import by_batch, count_batches, fill_batches
from mft_lightning.errors import UserError


@dataclass(frozen=True, eq=False)
class Epoch:
    """The global batches of an epoch.

    Attributes:
        order: its conversations, batch after batch: indices, ``int32 [draws]``.
        bounds: where each batch starts, and the end: ``int64 [steps + 1]``.
    """

    order: np.ndarray
    bounds: np.ndarray

    def __post_init__(self) -> None:
        self.order.setflags(write=False)  # kept, and handed out as views


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Global batches and their dealing.

    Args:
        lengths: tokens of each conversation, ``int32 [conversations]``.
        sizes: what a global batch and a micro-batch hold. Of conversations, the last batch of an epoch may hold fewer.
            Of tokens, a conversation longer than the budget stands alone.
        packed: whether micro-batches are packed rows.
        seed: of the shuffles.
        draws: what is drawn of each task; None for every conversation once an epoch.
    """

    lengths: np.ndarray
    sizes: BatchSizes
    packed: bool
    seed: int
    draws: TaskDraws | None = None
    _formed: dict[int, Epoch] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without the epoch at hand: a loader's process forms its own faster than it would be told one."""
        return {**self.__dict__, "_formed": {}}

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of every epoch, the same for all of them."""
        if self.sizes.tokens is None:
            assert self.sizes.total is not None
            return ceil(self.drawn / self.sizes.total)
        lengths = self.lengths if self.draws is None else self.draws.typical(self.lengths)
        return count_batches(lengths, self.sizes.tokens)

    @cached_property
    def fill(self) -> float:
        """The share of a token budget that the batches of the first epoch hold on average, 0 to 1."""
        budget = self.sizes.tokens
        assert budget is not None
        tokens = np.minimum(self.lengths[self.epoch(0).order].astype(np.int64), budget).sum()
        return float(tokens / (self.steps_per_epoch * budget))

    @property
    def left_out(self) -> int:
        """Draws of the first epoch that its batches have no room for."""
        return self.drawn - len(self.epoch(0).order)

    @property
    def drawn(self) -> int:
        """What an epoch draws: as many as there are conversations, but for ``draws`` of another total."""
        return len(self.lengths) if self.draws is None else sum(self.draws.per_epoch)

    def total_steps(self, max_epochs: int | None, max_steps: int | None) -> int:
        """Optimizer steps of a run that ends at whichever limit comes first; None and -1 are no limit.

        Raises:
            UserError: neither is a limit.
        """
        limits = [max_steps] if max_steps not in (None, -1) else []
        if max_epochs not in (None, -1):
            limits.append(max_epochs * self.steps_per_epoch)
        if not limits:
            raise UserError(
                "trainer.max_epochs: give it or trainer.max_steps; the learning rate decays towards the end."
            )
        return min(limits)

    def epoch(self, number: int) -> Epoch:
        """All global batches of an epoch; the last one asked for is kept.

        Where tokens are counted and tasks are drawn at rates, the tokens of an epoch vary while its steps do not: of
        an epoch that has too many, the last draws are left out, to 0.1% as few as can be.
        """
        if number not in self._formed:
            self._formed.clear()
            self._formed[number] = self._form(number)
        return self._formed[number]

    def global_batch(self, epoch: int, step: int) -> np.ndarray:
        """The conversations of one optimizer step: indices, ``int32 [conversations of the step]``."""
        formed = self.epoch(epoch)
        return formed.order[formed.bounds[step] : formed.bounds[step + 1]]

    def _form(self, number: int) -> Epoch:
        steps, budget = self.steps_per_epoch, self.sizes.tokens
        order = np.random.default_rng([self.seed, number]).permutation(np.arange(self.drawn, dtype=np.int32))
        if self.draws is not None:
            order = self.draws.drawn(number)[order]
        if budget is None:
            assert self.sizes.total is not None
            return Epoch(order, np.minimum(np.arange(steps + 1) * self.sizes.total, len(order)))
        labels = _most_that_fit(self.lengths[order], budget, steps, [self.seed, number])
        places, bounds = by_batch(labels, steps)
        return Epoch(order[places], bounds)

    def deal(self, batch: np.ndarray, rank: int, world: int) -> list[np.ndarray]:
        """One rank's micro-batches of a global batch; every rank gets the same number, some possibly empty."""
        return self.deal_to_all(batch, world)[rank::world]

    def deal_to_all(self, batch: np.ndarray, world: int) -> list[np.ndarray]:
        """The micro-batches of a global batch: the first of every rank in order, then the second of every rank.

        Packed ones are balanced by tokens. Padded ones hold like lengths, so that little is padded, and the ranks work
        on neighbours at the same time.
        """
        slots = world * self.sizes.micro_batches(len(batch), world)
        return (_balanced if self.packed else _neighbours)(batch, self.lengths[batch], slots)


def _most_that_fit(lengths: np.ndarray, budget: int, steps: int, seed: list[int]) -> np.ndarray:
    """The batch of each of the first conversations, ``int64 [placed]``: all, or to 0.1% as many as find a place."""

    def placed(count: int) -> np.ndarray | None:
        return fill_batches(lengths[:count], budget, steps, seed)

    tokens = np.cumsum(np.minimum(lengths.astype(np.int64, copy=False), budget))
    count = int(np.searchsorted(tokens, steps * budget, side="right"))  # more have too many tokens, however placed
    too_many, grain = count + 1, max(1, len(lengths) // 1000)
    fewer = grain
    while (found := placed(count)) is None:
        too_many, count = count, max(steps, count - fewer)  # as many as there are steps always fit
        fewer *= 2
    while too_many - count > grain:
        tried = (count + too_many) // 2
        if (labels := placed(tried)) is None:
            too_many = tried
        else:
            count, found = tried, labels
    return found


def deal_evaluation(lengths: np.ndarray, per_device: int, rank: int, world: int) -> list[np.ndarray]:
    """One rank's micro-batches of an evaluation over all conversations, each exactly once over the ranks."""
    slots = world * ceil(len(lengths) / (world * per_device))
    return _neighbours(np.arange(len(lengths)), lengths, slots)[rank::world]


def limit_per_task(tasks: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """Indices of at most ``limit`` conversations of each task, drawn by ``seed``, in ascending order."""
    if limit is None:
        return np.arange(len(tasks))
    order = np.random.default_rng([seed]).permutation(len(tasks))
    order = order[np.argsort(tasks[order], kind="stable")]  # task after task
    counts = np.bincount(tasks)
    before = np.repeat(np.cumsum(counts) - counts, counts)  # conversations of the tasks before each one's
    return np.sort(order[np.arange(len(order)) - before < limit])


def _neighbours(batch: np.ndarray, lengths: np.ndarray, slots: int) -> list[np.ndarray]:
    """As many conversations for every slot, give or take one, the longest for the first."""
    return np.array_split(batch[np.lexsort((batch, -lengths))], slots) if slots else []


def _balanced(batch: np.ndarray, lengths: np.ndarray, slots: int) -> list[np.ndarray]:
    """Longest first, each to the slot with the fewest tokens so far."""
    dealt: list[list[int]] = [[] for _ in range(slots)]
    heap = [(0, slot) for slot in range(slots)]
    order = np.lexsort((batch, -lengths))
    for index, length in zip(batch[order].tolist(), lengths[order].tolist(), strict=True):
        tokens, slot = heap[0]
        dealt[slot].append(index)
        heapreplace(heap, (tokens + length, slot))
    return _arrays(dealt)


def _arrays(parts: Sequence[list[int]]) -> list[np.ndarray]:
    """One array cut up, which takes a fraction of the time of an array for each."""
    together = np.array([index for part in parts for index in part], dtype=np.int64)
    arrays, start = [], 0
    for part in parts:
        arrays.append(together[start : start + len(part)])
        start += len(part)
    return arrays
