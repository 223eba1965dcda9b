"""Which records are trained on. Every record is admitted, or counted with the reason it is not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mft_lightning.data.splits import SPLITS
from mft_lightning.data.token_store import TokenStore
from mft_lightning.errors import UserError

ADMITTED, BAD, OVERLONG, NOTHING_SUPERVISED = range(4)
REASONS = {OVERLONG: "overlong", NOTHING_SUPERVISED: "nothing-supervised"}


@dataclass(frozen=True, kw_only=True)
class RecordPolicy:
    """What becomes of long conversations (more than ``seq_length`` tokens) and of bad records.

    With ``concat`` no conversation is too long: all are laid end to end and cut into rows.
    """

    seq_length: int
    on_overlong: Literal["drop", "truncate", "error"]
    on_bad_record: Literal["error", "skip"]
    max_skipped_share: float
    concat: bool = False

    @property
    def unit(self) -> str:
        """What is trained on, in the plural."""
        return "rows" if self.concat else "conversations"


@dataclass
class TaskReport:
    """Counts of one task: what is kept in each split and what is not, by reason; names that are no data files.

    With ``concat`` it is rows that are counted as ``conversations``, and as supervised all their tokens but the first.
    """

    task: str
    records: int = 0
    conversations: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: int = 0
    supervised_tokens: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bad: int = 0
    first_of: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Admission:
    """What becomes of each record of a store.

    Attributes:
        store: the records.
        policy: by which they were judged.
        outcome: ``int8 [records]``, ``ADMITTED`` or why not.
        lengths: ``int32 [records]``, tokens of each after truncation.
        n_supervised: ``int32 [records]``, supervised tokens of each after truncation.
    """

    store: TokenStore
    policy: RecordPolicy
    outcome: np.ndarray
    lengths: np.ndarray
    n_supervised: np.ndarray

    def why_not(self, record: int) -> tuple[str, str] | None:
        """The reason and the sentence for a record that is not admitted."""
        outcome = int(self.outcome[record])
        if outcome == ADMITTED:
            return None
        if outcome == BAD:
            return self.store.refusal(record)
        if outcome == OVERLONG:
            length = self.store.lengths[record]
            return REASONS[OVERLONG], f"has {length} tokens, more than data.seq_length: {self.policy.seq_length}"
        return REASONS[NOTHING_SUPERVISED], "has no token to learn from"

    def place(self, record: int) -> str:
        """``file:line`` of a record."""
        file, line = self.store.where(record)
        return f"{file}:{line}"

    def report(self, task: str, codes: np.ndarray, records: slice) -> TaskReport:
        """Counts of the records of a task.

        Args:
            task: its name.
            codes: ``int8 [records of the task]``, the split of each.
            records: of the task, in the store.
        """
        outcome, lengths, supervised = self.outcome[records], self.lengths[records], self.n_supervised[records]
        admitted = outcome == ADMITTED
        counts, tokens = (
            np.bincount(codes[admitted], weights=weights, minlength=len(SPLITS)).astype(np.int64)
            for weights in (None, lengths[admitted])
        )
        learned = int(supervised[admitted].sum(dtype=np.int64))
        if self.policy.concat:
            counts = -(-tokens // self.policy.seq_length)
            learned = int((tokens - counts).sum())
        report = TaskReport(
            task,
            records=len(outcome),
            conversations=dict(zip(SPLITS, counts.tolist(), strict=True)),
            tokens=int(tokens.sum()),
            supervised_tokens=learned,
            truncated=int((admitted & (lengths < self.store.lengths[records])).sum()),
            bad=int((outcome == BAD).sum()),
        )
        first = {name: np.flatnonzero(outcome == code) for code, name in REASONS.items()}
        told = [*np.flatnonzero(outcome == BAD).tolist(), *(int(found[0]) for found in first.values() if len(found))]
        for place in sorted(told):
            record = records.start + place
            reason, detail = self.why_not(record) or ("", "")
            report.dropped[reason] += 1 if outcome[place] == BAD else len(first[reason])
            if reason not in report.first_of:
                report.first_of[reason] = f"{self.place(record)} {detail}"
        return report


def admit(store: TokenStore, policy: RecordPolicy, *, pretrain: bool) -> Admission:
    """Judge every record of a store.

    Args:
        store: the records.
        policy: what becomes of long ones.
        pretrain: whether every token is supervised, so that a record can be cut anywhere.
    """
    outcome = np.full(len(store), ADMITTED, dtype=np.int8)
    lengths, supervised = store.lengths, store.n_supervised
    if not policy.concat:
        over = lengths > policy.seq_length
        cut = np.zeros_like(over)
        if policy.on_overlong == "truncate":
            ends = store.first_ends()
            cut = over if pretrain else over & (ends > 0) & (ends <= policy.seq_length)
        outcome[over & ~cut] = OVERLONG
        if cut.any():
            lengths = np.where(cut, np.int32(policy.seq_length), lengths)
            supervised = np.where(cut, store.supervised_within(policy.seq_length), supervised)
    outcome[(supervised == 0) & (outcome == ADMITTED)] = NOTHING_SUPERVISED
    outcome[store.unusable] = BAD
    return Admission(store, policy, outcome, lengths, supervised)


def refuse(admission: Admission) -> None:
    """Raise for the first record that the policy makes an error, naming file, line, field and reason."""
    policy, refused = admission.policy, np.zeros(len(admission.outcome), dtype=bool)
    if policy.on_bad_record == "error":
        refused |= admission.outcome == BAD
    if policy.on_overlong == "error":
        refused |= admission.outcome == OVERLONG
    if not refused.any():
        return
    record = int(refused.argmax())
    reason, detail = admission.why_not(record) or ("", "")
    if admission.outcome[record] == BAD:
        raise UserError(
            f"{admission.place(record)}: {detail} [{reason}]. "
            "Mend the line, or leave bad lines out and count them with data.on_bad_record: skip."
        )
    raise UserError(f"{admission.place(record)}: {detail}. Raise it, or set data.on_overlong: drop or truncate.")


def refuse_share(report: TaskReport, policy: RecordPolicy) -> None:
    """Raise where more than ``max_skipped_share`` of a task's records are bad."""
    share = report.bad / report.records
    if share > policy.max_skipped_share:
        firsts = "; ".join(
            f"{reason}: {first}" for reason, first in report.first_of.items() if reason not in REASONS.values()
        )
        raise UserError(
            f"task {report.task!r}: {report.bad} of {report.records} records are bad ({share:.1%}), more than "
            f"data.max_skipped_share: {policy.max_skipped_share}. The first of each kind: {firsts}"
        )
