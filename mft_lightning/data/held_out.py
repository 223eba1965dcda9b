"""The answers of conversations, each with the prompt that asks for it: the true history before it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np

from mft_lightning.data.token_table import RecordTable, TokenTable

NOTHING = -1  # the number of a batch that holds no question


@dataclass(frozen=True)
class Held:
    """An answer of a held-out conversation: its task, the ids before it, and its own without the eos."""

    task: int
    prompt: list[int]
    reference: list[int]


def whole_answers(table: TokenTable, index: int, eos: int) -> Iterator[tuple[int, int]]:
    """Where the answers of a conversation start, and where they end with their eos, in order.

    Without one that was truncated: nobody knows its end.
    """
    ids, supervised = table.row(index)
    edges = np.flatnonzero(np.diff(supervised.astype(np.int8), prepend=0, append=0))
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if ids[end - 1] == eos:
            yield start, end


def held_at(table: TokenTable, index: int, start: int, end: int) -> Held:
    """The answer at a place that :func:`whole_answers` gives."""
    ids, _ = table.row(index)
    return Held(int(table.tasks[index]), ids[:start].tolist(), ids[start : end - 1].tolist())


class Questions:
    """The last answer of each of many conversations, to be asked for in batches of like length.

    What a batch holds depends neither on how many devices answer nor on what is answered already.

    Args:
        parts: names of splits, each with its table and the conversations of it, ``int [chosen]``.
        tasks: how many there are.
        eos: the id that ends an answer.
        batch_size: conversations of a batch, but perhaps of the last.

    Attributes:
        splits: the name of the split of each question. Questions are in the order of the tasks, and of a task in that
            of its files and lines; those of validation directories come after the others.
        tasks: the task of each.
        turns: how many answers of its conversation come before it.
        batches: numbers of questions, the longest prompts first.
        answered: numbers of batches that need not be asked.
        left_out: conversations of each task without a whole answer, ``int [tasks]``.
    """

    def __init__(
        self, parts: Sequence[tuple[str, RecordTable, np.ndarray]], tasks: int, eos: int, batch_size: int
    ) -> None:
        self._tables = {split: table for split, table, _ in parts}
        self.answered: Collection[int] = ()
        self.left_out = np.zeros(tasks, dtype=np.int64)
        stores = list({id(table.store): table.store for table in self._tables.values()})
        found = []
        for split, table, chosen in parts:
            for index in chosen.tolist():
                task, answers = int(table.tasks[index]), list(whole_answers(table, index, eos))
                if answers:
                    place = (task, stores.index(id(table.store)), int(table.records[index]))
                    found.append((place, split, (index, task, len(answers) - 1, *answers[-1])))
                else:
                    self.left_out[task] += 1
        found.sort()
        self.splits = [split for _, split, _ in found]
        numbers = np.array([numbers for *_, numbers in found], dtype=np.int64).reshape(-1, 5)
        self._index, self.tasks, self.turns, self._start, self._end = numbers.T
        order = np.lexsort((np.arange(len(found)), -self._start))
        self.batches = [order[start : start + batch_size] for start in range(0, len(found), batch_size)]

    def __len__(self) -> int:
        return len(self.splits)

    def held(self, question: int) -> Held:
        """A question with its tokens."""
        index, start, end = (int(values[question]) for values in (self._index, self._start, self._end))
        return held_at(self._tables[self.splits[question]], index, start, end)

    def where(self, question: int) -> tuple[Path, int]:
        """The file and line that its conversation stands in."""
        ((file, line),) = self._tables[self.splits[question]].where(int(self._index[question]))
        return file, line

    def batch(self, number: int) -> list[Held]:
        """The questions of a batch; none of ``NOTHING``."""
        return [] if number == NOTHING else [self.held(question) for question in self.batches[number].tolist()]

    def share(self, rank: int, world: int) -> list[int]:
        """Numbers of the batches that a rank answers; every rank gets as many, ``NOTHING`` among them."""
        asked = [number for number in range(len(self.batches)) if number not in self.answered]
        return [*asked, *[NOTHING] * (-len(asked) % world)][rank::world]

    @cached_property
    def digest(self) -> str:
        """Tells questions apart that differ in any token, in their order or in their batches."""
        found = sha256()
        for split, table in self._tables.items():
            found.update(f"{split} {table.digest} ".encode())
        sizes = np.array([len(batch) for batch in self.batches])
        for values in (self._index, self._start, self._end, sizes, *self.batches):
            found.update(values.astype("<i8").tobytes())
        return found.hexdigest()[:16]
