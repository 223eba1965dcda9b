"""Task directories as a whole: every record with its task, its split, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mft_lightning.data.admission import (
    ADMITTED,
    Admission,
    RecordPolicy,
    TaskReport,
    admit,
    refuse,
    refuse_share,
)
from mft_lightning.data.chat_encoder import Encoded
from mft_lightning.data.splits import SPLITS, split_records
from mft_lightning.data.task_files import find_files
from mft_lightning.data.tasks import Task
from mft_lightning.data.token_cache import TokenCache
from mft_lightning.data.token_store import EncodedFile, TokenStore
from mft_lightning.data.token_table import ConcatTable, RecordTable, TokenTable
from mft_lightning.errors import UserError


@dataclass(frozen=True)
class Record:
    """A record as it was read and encoded; of one that is left out, ``reason`` and ``detail`` tell why.

    ``input_ids`` and ``spans`` are cut where the conversation was truncated, and empty where it could not be read.
    """

    task: str
    split: str
    file: Path
    line: int
    input_ids: list[int]
    spans: list[int]
    truncated: bool = False
    reason: str | None = None
    detail: str | None = None

    @property
    def encoded(self) -> Encoded:
        return Encoded(self.input_ids, self.spans)


@dataclass(frozen=True)
class Corpus:
    """The records of some tasks.

    Attributes:
        tasks: the tasks.
        numbers: the number of each task in the run.
        first: ``int64 [tasks + 1]``, the first record of each task.
        codes: ``int8 [records]``, the split of each, an index into ``SPLITS``.
        admission: what becomes of each.
        reports: counts of each task.
    """

    tasks: Sequence[Task]
    numbers: Sequence[int]
    first: np.ndarray
    codes: np.ndarray
    admission: Admission
    reports: list[TaskReport]

    def refuse(self) -> None:
        """Raise where the policy makes a record, or too many of a task's, an error."""
        refuse(self.admission)
        for report in self.reports:
            refuse_share(report, self.admission.policy)

    def records(self, task: int, split: int) -> np.ndarray:
        """All records of a task (its place in ``tasks``) and a split, admitted or not, in order."""
        start, end = self.first[task], self.first[task + 1]
        return start + np.flatnonzero(self.codes[start:end] == split)

    def record(self, number: int) -> Record:
        """A record with all there is to say of it."""
        admission, store = self.admission, self.admission.store
        task = int(np.searchsorted(self.first, number, side="right")) - 1
        length = int(admission.lengths[number])
        ids, spans = store.row(number)
        if admission.policy.concat:  # a record's first token comes after the one before, but at the start of a row
            spans = np.array([0, length])
        spans = np.minimum(spans, length).reshape(-1, 2)
        file, line = store.where(number)
        reason, detail = admission.why_not(number) or (None, None)
        return Record(
            task=self.tasks[task].name,
            split=SPLITS[self.codes[number]],
            file=file,
            line=line,
            input_ids=ids[:length].tolist(),
            spans=spans[spans[:, 0] < spans[:, 1]].ravel().tolist(),
            truncated=length < len(ids),
            reason=reason,
            detail=detail,
        )

    def table(self, split: str) -> TokenTable:
        """The conversations of a split that are trained on or evaluated."""
        admission = self.admission
        chosen = np.flatnonzero((admission.outcome == ADMITTED) & (self.codes == SPLITS.index(split)))
        chosen = chosen.astype(np.int32)  # as all that is kept for each record: there are less than 2^31
        tasks = np.repeat(np.asarray(self.numbers, dtype=np.int32), np.diff(self.first))[chosen]
        if admission.policy.concat:
            return ConcatTable(admission.store, chosen, tasks, admission.policy.seq_length)
        lengths, supervised = admission.lengths[chosen], admission.n_supervised[chosen]
        return RecordTable(admission.store, chosen, lengths, tasks, supervised)

    def skipped(self) -> Iterator[dict[str, object]]:
        """Every bad record: its task, split, file, line, reason and detail."""
        for number in self.admission.store.unusable.tolist():
            record = self.record(number)
            where = {"task": record.task, "split": record.split, "file": str(record.file), "line": record.line}
            yield {**where, "reason": record.reason, "detail": record.detail}


def load_corpus(
    tasks: Sequence[Task],
    numbers: Sequence[int],
    shares: Sequence[float],
    cache: TokenCache,
    policy: RecordPolicy,
    seed: int,
    *,
    stop: bool = True,
) -> Corpus:
    """All records of the tasks, from the cache, which is filled first where it must be.

    Args:
        tasks: to load.
        numbers: of each in the run.
        shares: of the splits.
        cache: of encoded files.
        policy: what becomes of bad and long records.
        seed: of the splits.
        stop: whether encoding ends at the first record that the policy makes an error.

    Raises:
        UserError: a task without any record, and what the cache raises; the first refused record, if it stops there.
    """
    pretrain = cache.chat_format.pretrain
    files: list[EncodedFile] = []
    first = [0]
    for task in tasks:
        found = cache.open(task, (lambda store: refuse(admit(store, policy, pretrain=pretrain))) if stop else None)
        count = sum(len(batch) for file in found for batch in file.batches)
        if not count:
            names = ", ".join(file.source.name for file in found)
            raise UserError(f"{task.key}: task {task.name!r} is empty ({task.directory}: {names}).")
        files += found
        first.append(first[-1] + count)
    admission = admit(TokenStore(files), policy, pretrain=pretrain)
    codes = [
        split_records(end - start, shares, seed, task.name)
        for task, start, end in zip(tasks, first, first[1:], strict=False)
    ]
    reports = [
        admission.report(task.name, code, slice(start, start + len(code)))
        for task, code, start in zip(tasks, codes, first, strict=False)
    ]
    for task, report in zip(tasks, reports, strict=True):
        report.unread = find_files(task).unread
    return Corpus(tasks, numbers, np.array(first), np.concatenate(codes), admission, reports)
