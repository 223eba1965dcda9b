"""The plan: which conversations an optimizer step sees, and how they are dealt to ranks and micro-batches.

Everything here is a pure function of (seed, epoch, step, lengths): global batches are formed first and do not know how
many devices there are; dealing them out changes who computes what, never what is learned from.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np

from mft_lightning.errors import UserError


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of ``count`` conversations in an epoch: every one exactly once, ``int64 [count]``."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.setflags(write=False)  # cached, and handed out as views
    return order


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Global batches and their dealing.

    Args:
        lengths: tokens of each conversation, ``int64 [conversations]``.
        total: conversations of a global batch; the last of an epoch may be shorter.
        per_device: conversations of a micro-batch: at most when padded, on average when packed.
        packed: whether micro-batches are packed rows.
        seed: of the shuffles.
    """

    lengths: np.ndarray
    total: int
    per_device: int
    packed: bool
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return ceil(len(self.lengths) / self.total)

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

    def global_batch(self, epoch: int, step: int) -> np.ndarray:
        """The conversations of one optimizer step: indices, ``int64 [<= total]``."""
        order = epoch_order(len(self.lengths), self.seed, epoch)
        return order[step * self.total : (step + 1) * self.total]

    def deal(self, batch: np.ndarray, rank: int, world: int) -> list[np.ndarray]:
        """One rank's micro-batches of a global batch; every rank gets the same number, some possibly empty.

        Packed ones are balanced by tokens. Padded ones hold like lengths, so that little is padded, and the ranks work
        on neighbours at the same time.
        """
        micros = ceil(len(batch) / (world * self.per_device))
        if not micros:
            return []
        slots = world * micros
        dealt = self._balanced(batch, slots) if self.packed else np.array_split(self._longest_first(batch), slots)
        return dealt[rank::world]

    def _longest_first(self, batch: np.ndarray) -> np.ndarray:
        return batch[np.lexsort((batch, -self.lengths[batch]))]

    def _balanced(self, batch: np.ndarray, slots: int) -> list[np.ndarray]:
        """Longest first, each to the slot with the fewest tokens so far."""
        dealt: list[list[int]] = [[] for _ in range(slots)]
        heap = [(0, slot) for slot in range(slots)]
        for index in self._longest_first(batch):
            tokens, slot = heapq.heappop(heap)
            dealt[slot].append(int(index))
            heapq.heappush(heap, (tokens + int(self.lengths[index]), slot))
        return [np.array(slot, dtype=np.int64) for slot in dealt]


def deal_evaluation(lengths: np.ndarray, per_device: int, rank: int, world: int) -> list[np.ndarray]:
    """One rank's micro-batches of an evaluation over all conversations, each exactly once over the ranks."""
    everything = np.arange(len(lengths))
    plan = Plan(lengths=lengths, total=max(1, len(lengths)), per_device=per_device, packed=False, seed=0)
    return plan.deal(everything, rank, world)


def limit_per_task(tasks: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """Indices of at most ``limit`` conversations of each task, drawn by ``seed``, in ascending order."""
    if limit is None:
        return np.arange(len(tasks))
    order = np.random.default_rng([seed]).permutation(len(tasks))
    kept = [order[tasks[order] == task][:limit] for task in np.unique(tasks)]
    return np.sort(np.concatenate(kept)) if kept else order
