"""Task directories to tables of token ids. Every record is in a table, or counted with the reason it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np

from mft_lightning.data.chat_format import ChatFormat, Encoded
from mft_lightning.data.lines import Line, read_lines, task_files
from mft_lightning.data.records import BadRecord, Conversation, parse_record
from mft_lightning.data.tasks import SPLITS, Task, split_records
from mft_lightning.errors import UserError

BATCH = 1000  # records that the tokenizer sees at once
OVERLONG, NOTHING_SUPERVISED = "overlong", "nothing-supervised"


@dataclass(frozen=True, kw_only=True)
class RecordPolicy:
    """What becomes of long conversations (more than ``seq_length`` tokens) and of bad records."""

    seq_length: int
    on_overlong: Literal["drop", "truncate", "error"]
    on_bad_record: Literal["error", "skip"]
    max_skipped_share: float


@dataclass(frozen=True)
class Record:
    """A line after encoding. ``reason`` is None where it is trained on; ``bad`` tells bad records from long ones.

    ``length`` counts the conversation's tokens before anything was truncated.
    """

    line: Line
    conversation: Conversation | None = None
    encoded: Encoded | None = None
    reason: str | None = None
    detail: str = ""
    bad: bool = False
    truncated: bool = False
    length: int = 0

    @property
    def where(self) -> str:
        return f"{self.line.file}:{self.line.number}"


@dataclass
class TaskReport:
    """Counts of one task: what is kept in each split and what is not, by reason."""

    task: str
    records: int = 0
    conversations: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: int = 0
    supervised_tokens: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bad: int = 0
    first_of: dict[str, str] = field(default_factory=dict)

    def count(self, record: Record, split: str) -> None:
        """Add a record of ``split``: to the conversations, or to what was left out and why."""
        self.records += 1
        self.bad += record.bad
        self.truncated += record.truncated
        if record.reason is not None:
            self.dropped[record.reason] += 1
            self.first_of.setdefault(record.reason, f"{record.where} {record.detail}")
        elif record.encoded is not None:
            self.conversations[split] += 1
            self.tokens += len(record.encoded.input_ids)
            self.supervised_tokens += sum(record.encoded.supervised)


@dataclass(frozen=True)
class TokenTable:
    """Conversations laid end to end.

    Attributes:
        input_ids: ``int32 [tokens]``.
        supervised: ``uint8 [tokens]``, 1 where the token is an answer's.
        offsets: ``int64 [conversations + 1]``, where each conversation starts.
        tasks: ``int64 [conversations]``, task numbers.
        n_supervised: ``int64 [conversations]``, supervised tokens of each, at least 1.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray
    tasks: np.ndarray
    n_supervised: np.ndarray

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each conversation, ``int64 [conversations]``."""
        return np.diff(self.offsets)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and supervision of one conversation, each ``[length]``."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.input_ids[part], self.supervised[part]

    @classmethod
    def of(cls, rows: Sequence[tuple[int, Encoded]]) -> TokenTable:
        """A table of ``(task number, encoded conversation)`` rows."""
        lengths = np.array([len(encoded.input_ids) for _, encoded in rows], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return cls(
            input_ids=np.fromiter((i for _, e in rows for i in e.input_ids), np.int32, offsets[-1]),
            supervised=np.fromiter((s for _, e in rows for s in e.supervised), np.uint8, offsets[-1]),
            offsets=offsets,
            tasks=np.array([task for task, _ in rows], dtype=np.int64),
            n_supervised=np.array([sum(e.supervised) for _, e in rows], dtype=np.int64),
        )


def encode_records(lines: Iterable[Line], chat_format: ChatFormat, policy: RecordPolicy) -> Iterator[Record]:
    """Every line as a :class:`Record`, in order; none is left out."""
    lines = iter(lines)
    while batch := list(islice(lines, BATCH)):
        parsed = [_parsed(line, chat_format) for line in batch]
        good = [record.conversation for record in parsed if record.conversation is not None]
        encoded = iter(chat_format.encode(good))
        for record in parsed:
            if record.conversation is None:
                yield record
            else:
                yield _fitted(record.line, record.conversation, next(encoded), policy, chat_format.pretrain)


def _parsed(line: Line, chat_format: ChatFormat) -> Record:
    try:
        conversation = parse_record(line.raw)
        list(chat_format.segments(conversation))  # refuses what this mode cannot learn from
    except BadRecord as error:
        return Record(line, reason=error.reason, detail=error.detail, bad=True)
    return Record(line, conversation)


def _fitted(line: Line, conversation: Conversation, encoded: Encoded, policy: RecordPolicy, pretrain: bool) -> Record:
    reason, detail, truncated = None, "", False
    length = len(encoded.input_ids)
    if length > policy.seq_length:
        fits = policy.on_overlong == "truncate" and (pretrain or _first_answer_end(encoded) <= policy.seq_length)
        if fits:
            encoded, truncated = encoded.truncated(policy.seq_length), True
        else:
            reason, detail = OVERLONG, f"has {length} tokens, more than data.seq_length: {policy.seq_length}"
    if reason is None and not any(encoded.supervised):
        reason, detail = NOTHING_SUPERVISED, "has no token to learn from"
    return Record(line, conversation, encoded, reason, detail, truncated=truncated, length=length)


def _first_answer_end(encoded: Encoded) -> int:
    start = encoded.supervised.index(1)
    return encoded.supervised.index(0, start) if 0 in encoded.supervised[start:] else len(encoded.supervised)


def task_lines(task: Task) -> Iterator[Line]:
    """The lines of all files of a task, in the order of the files' names."""
    for file in task_files(task.directory):
        yield from read_lines(file)


def split_codes(task: Task, shares: Sequence[float], seed: int) -> np.ndarray:
    """The split of each line of a task (see :func:`~mft_lightning.data.tasks.split_records`).

    Raises:
        UserError: the task has no line at all.
    """
    count = sum(1 for _ in task_lines(task))
    if not count:
        files = ", ".join(file.name for file in task_files(task.directory))
        raise UserError(f"data.data_paths: task {task.name!r} is empty ({task.directory}: {files}).")
    return split_records(count, shares, seed, task.name)


def build_tables(
    tasks: Sequence[Task],
    shares: Sequence[float],
    chat_format: ChatFormat,
    policy: RecordPolicy,
    seed: int,
) -> tuple[dict[str, TokenTable], list[TaskReport]]:
    """Encode all tasks into a table per split, with a report per task.

    Raises:
        UserError: a record that ``policy`` does not let pass, naming file and line.
    """
    rows: dict[str, list[tuple[int, Encoded]]] = {split: [] for split in SPLITS}
    reports = []
    for number, task in enumerate(tasks):
        codes = split_codes(task, shares, seed)
        report = TaskReport(task.name)
        for code, record in zip(codes, encode_records(task_lines(task), chat_format, policy), strict=True):
            refuse(record, policy)
            report.count(record, SPLITS[code])
            if record.reason is None and record.encoded is not None:
                rows[SPLITS[code]].append((number, record.encoded))
        refuse_share(report, policy)
        reports.append(report)
    return {split: TokenTable.of(rows[split]) for split in SPLITS}, reports


def refuse(record: Record, policy: RecordPolicy) -> None:
    """Raise for a record that the policy makes an error, naming file, line, field and reason."""
    if record.bad and policy.on_bad_record == "error":
        raise UserError(
            f"{record.where}: {record.detail} [{record.reason}]. "
            "Mend the line, or leave bad lines out and count them with data.on_bad_record: skip."
        )
    if record.reason == OVERLONG and policy.on_overlong == "error":
        raise UserError(f"{record.where}: {record.detail}. Raise it, or set data.on_overlong: drop or truncate.")


def refuse_share(report: TaskReport, policy: RecordPolicy) -> None:
    """Raise where more than ``max_skipped_share`` of a task's records are bad."""
    share = report.bad / report.records
    if share > policy.max_skipped_share:
        firsts = "; ".join(f"{reason}: {first}" for reason, first in report.first_of.items())
        raise UserError(
            f"task {report.task!r}: {report.bad} of {report.records} records are bad ({share:.1%}), more than "
            f"data.max_skipped_share: {policy.max_skipped_share}. The first of each kind: {firsts}"
        )
