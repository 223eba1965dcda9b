"""Loaders over the plan. The training loader's whole state is (epoch, next step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mft_lightning.data.collate import MicroBatch, StepBatch, collate, collate_step
from mft_lightning.data.plan import Plan
from mft_lightning.data.token_table import TokenTable
from mft_lightning.data.workers import loader_options


class TrainSteps(Dataset[StepBatch]):
    """``steps[(epoch, step)]`` is one rank's share of that optimizer step."""

    def __init__(
        self, table: TokenTable, plan: Plan, *, tasks: int, pad_id: int, rank: int = 0, world: int = 1
    ) -> None:
        self.table, self.plan = table, plan
        self.tasks, self.pad_id = tasks, pad_id
        self.rank, self.world = rank, world

    def __getitem__(self, key: tuple[int, int]) -> StepBatch:
        batch = self.plan.global_batch(*key)
        dealt = self.plan.deal(batch, self.rank, self.world)
        return collate_step(self.table, batch, dealt, tasks=self.tasks, packed=self.plan.packed, pad_id=self.pad_id)


class EvaluationSteps(Dataset[MicroBatch]):
    """One rank's micro-batches of an evaluation."""

    def __init__(self, table: TokenTable, dealt: Sequence[np.ndarray], *, packed: bool, pad_id: int) -> None:
        self.table, self.dealt = table, dealt
        self.packed, self.pad_id = packed, pad_id

    def __len__(self) -> int:
        return len(self.dealt)

    def __getitem__(self, index: int) -> MicroBatch:
        return collate(self.table, self.dealt[index], packed=self.packed, pad_id=self.pad_id)


class Cursor(Sampler[tuple[int, int]]):
    """Goes from (epoch, step) to the end of that epoch; the next iteration starts where the last one stopped."""

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.epoch = self.step = 0

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, start = self.epoch, self.step  # fixed here, because workers read ahead of `advance`
        for step in range(start, self.steps_per_epoch):
            yield epoch, step

    def advance(self) -> None:
        self.epoch, self.step = divmod(self.epoch * self.steps_per_epoch + self.step + 1, self.steps_per_epoch)


class TrainLoader(DataLoader[StepBatch]):
    """A DataLoader that resumes at any step without replay.

    Args:
        steps: the plan's steps.
        num_workers: loader processes.
        pinned: whether batches are put where a GPU can fetch them.
    """

    def __init__(self, steps: TrainSteps, num_workers: int, *, pinned: bool = False) -> None:
        self.plan = steps.plan
        self.cursor = Cursor(self.plan.steps_per_epoch)
        super().__init__(
            steps,
            sampler=self.cursor,
            batch_size=None,
            generator=torch.Generator().manual_seed(0),  # else every `iter` draws from the global RNG
            **loader_options(num_workers, pinned=pinned),
        )

    def __iter__(self) -> Iterator[StepBatch]:  # type: ignore[override]  # DataLoader names its private iterator
        # Before workers are forked, which then have it; those of a fork server form it themselves.
        self.plan.epoch(self.cursor.epoch)
        for batch in super().__iter__():
            # Before the yield: Lightning never exhausts the iterator of a loader that has a length.
            self.cursor.advance()
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.cursor.epoch, "step": self.cursor.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.cursor.epoch, self.cursor.step = state["epoch"], state["step"]
