"""A survey of task directories: counts, lengths, and what another way of tokenising would make of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.records import Conversation
from mft_lightning.data.token_cache import BATCH, Record, TaskReport

QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass
class TaskSurvey:
    """What there is to know of a task before training on it.

    Attributes:
        report: conversations, tokens, and what was left out.
        lengths: tokens of every conversation that could be read, before any was left out or cut as too long.
        differing: conversations that a tokenizer given the whole rendered text at once would encode otherwise.
    """

    report: TaskReport
    lengths: array[int] = field(default_factory=lambda: array("q"))
    differing: int = 0

    def quantiles(self) -> list[int]:
        """The median, 90th and 99th percentile and maximum of the lengths: each the length of a conversation."""
        if not self.lengths:
            return [0] * len(QUANTILES)
        return [int(q) for q in np.quantile(np.asarray(self.lengths), QUANTILES, method="higher")]


class Survey:
    """Builds a :class:`TaskSurvey` for every task from records in any order."""

    def __init__(self, tasks: Sequence[str], chat_format: ChatFormat) -> None:
        self.chat_format = chat_format
        self.tasks = {name: TaskSurvey(TaskReport(name)) for name in tasks}
        self._waiting: list[tuple[str, Conversation]] = []

    def add(self, task: str, split: str, record: Record) -> None:
        """Count a record of ``split``."""
        survey = self.tasks[task]
        survey.report.count(record, split)
        if record.conversation is not None:
            survey.lengths.append(record.length)
            self._waiting.append((task, record.conversation))
            if len(self._waiting) == BATCH:
                self._compare()

    def finish(self) -> list[TaskSurvey]:
        """The surveys, in the order of the tasks, when all records were added."""
        self._compare()
        return list(self.tasks.values())

    def _compare(self) -> None:
        same = self.chat_format.encodes_as_one_string([conversation for _, conversation in self._waiting])
        for (task, _), alike in zip(self._waiting, same, strict=True):
            self.tasks[task].differing += not alike
        self._waiting.clear()
