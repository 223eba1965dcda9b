"""The conversations of a split, as the plan and the collator see them: lengths, tasks, and a row of tokens for each."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from mft_lightning.data.token_store import TokenStore

STRETCH = 1 << 16  # of values that a digest takes in at once


class TokenTable(ABC):
    """Conversations, numbered from 0.

    Attributes:
        lengths: ``int32 [conversations]``, tokens of each.
        tasks: ``int32 [conversations]``, task numbers.
        n_supervised: ``int32 [conversations]``, supervised tokens of each, at least 1.
    """

    def __init__(self, lengths: np.ndarray, tasks: np.ndarray, n_supervised: np.ndarray) -> None:
        self.lengths, self.tasks, self.n_supervised = (
            values.astype(np.int32, copy=False) for values in (lengths, tasks, n_supervised)
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and supervision (1 or 0) of one conversation, each ``[length]``."""

    @abstractmethod
    def where(self, index: int) -> list[tuple[Path, int]]:
        """The file and line of every record that one conversation has tokens of."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Tells tables apart that differ in any token, its supervision, its task or their order."""


class RecordTable(TokenTable):
    """A conversation for each record.

    Args:
        store: holds the records.
        records: ``int32 [conversations]``, numbers in ``store``.
        lengths: tokens of each, at most those of the record, which is cut.
        tasks: their numbers.
        n_supervised: supervised tokens of each.
    """

    def __init__(
        self, store: TokenStore, records: np.ndarray, lengths: np.ndarray, tasks: np.ndarray, n_supervised: np.ndarray
    ) -> None:
        super().__init__(lengths, tasks, n_supervised)
        self.store, self.records = store, records

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids, spans = self.store.row(int(self.records[index]))
        ids = ids[: self.lengths[index]]
        supervised = np.zeros(len(ids), dtype=np.uint8)
        for start, end in spans.reshape(-1, 2):
            supervised[start:end] = 1
        return ids, supervised

    def where(self, index: int) -> list[tuple[Path, int]]:
        return [self.store.where(int(self.records[index]))]

    @property
    def digest(self) -> str:
        return _digest(self.store, self.records, self.lengths, self.tasks)


class ConcatTable(TokenTable):
    """Rows of ``width`` tokens that the token stream of each task is cut into, across the records' ends.

    Every token but a row's first is supervised. The last row of a task is as short as what is left; where that were a
    single token, which nothing could predict, the row before it gives it one.

    Args:
        store: holds the records, each of which ends with its eos.
        records: ``int32 [records]``, numbers in ``store``, in the order of the stream.
        tasks: ``int32 [records]``, their numbers.
        width: tokens of a row, at least 3, as rows of 2 could leave one of a single token.
    """

    def __init__(self, store: TokenStore, records: np.ndarray, tasks: np.ndarray, width: int) -> None:
        order = np.argsort(tasks, kind="stable")
        self.store, self.records = store, records[order]
        tasks, lengths = tasks[order], store.lengths[self.records].astype(np.int64)
        self._ends = np.cumsum(lengths)
        bounds, numbers = [np.zeros(1, dtype=np.int64)], []
        for task in np.unique(tasks):
            start, total = int(bounds[-1][-1]), int(lengths[tasks == task].sum())
            cuts = np.append(np.arange(width, total, width), total)
            if len(cuts) > 1 and cuts[-1] - cuts[-2] == 1:
                cuts[-2] -= 1
            bounds.append(start + cuts)
            numbers.append(np.full(len(cuts), task))
        self._bounds = np.concatenate(bounds)
        widths = np.diff(self._bounds)
        super().__init__(widths, np.concatenate(numbers) if numbers else widths, widths - 1)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start, end = int(self._bounds[index]), int(self._bounds[index + 1])
        place = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while start < end:
            ids, _ = self.store.row(int(self.records[place]))
            record_end = int(self._ends[place])
            part = ids[len(ids) - (record_end - start) :][: end - start]
            parts.append(part)
            start, place = start + len(part), place + 1
        supervised = np.ones(int(self.lengths[index]), dtype=np.uint8)
        supervised[0] = 0
        return np.concatenate(parts), supervised

    def where(self, index: int) -> list[tuple[Path, int]]:
        first = np.searchsorted(self._ends, self._bounds[index], side="right")
        last = np.searchsorted(self._ends, self._bounds[index + 1], side="left")
        return [self.store.where(int(record)) for record in self.records[first : last + 1]]

    @property
    def digest(self) -> str:
        return _digest(self.store, self.records, self._bounds, self.tasks)


def _digest(store: TokenStore, records: np.ndarray, *arrays: np.ndarray) -> str:
    """Of the records' tokens in their order, not of where they stand, and of arrays, a stretch at a time."""
    found = hashlib.sha256()
    for start in range(0, len(records), STRETCH):
        found.update(store.digests(records[start : start + STRETCH]).astype("<u8", copy=False).data)
    for values in arrays:
        for start in range(0, len(values), STRETCH):
            found.update(values[start : start + STRETCH].astype("<i8").data)
    return found.hexdigest()[:16]
