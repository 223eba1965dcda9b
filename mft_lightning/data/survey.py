"""A survey of task directories: counts, lengths, and what another way of tokenising would make of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mft_lightning.data.admission import BAD, TaskReport
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.corpus import Corpus

QUANTILES = (0.5, 0.9, 0.99, 1.0)
COMPARED = 2000  # conversations of a task, at most, that are tokenised again
BATCH = 200  # of these that the tokenizer sees at once


@dataclass
class TaskSurvey:
    """What there is to know of a task before training on it.

    Attributes:
        report: conversations, tokens, and what was left out.
        lengths: ``int32 [conversations]``, tokens of every conversation that could be read, before any was left out or
            cut as too long.
        compared: conversations that were tokenised again as one string, from the first on.
        differing: how many of them a tokenizer that is given the whole rendered text at once would encode otherwise.
    """

    report: TaskReport
    lengths: np.ndarray
    compared: int
    differing: int

    def quantiles(self) -> list[int]:
        return quantiles(self.lengths)


def quantiles(lengths: np.ndarray) -> list[int]:
    """The median, 90th and 99th percentile and maximum: each the length of a conversation."""
    if not len(lengths):
        return [0] * len(QUANTILES)
    return [int(q) for q in np.quantile(lengths, QUANTILES, method="higher")]


def lengths_of(corpus: Corpus, task: int) -> np.ndarray:
    """Tokens of each conversation of a task that could be read, as they are, ``int32 [conversations]``."""
    return corpus.admission.store.lengths[_readable(corpus, task)]


def _readable(corpus: Corpus, task: int) -> np.ndarray:
    start, end = corpus.first[task], corpus.first[task + 1]
    return start + np.flatnonzero(corpus.admission.outcome[start:end] != BAD)


def survey(corpus: Corpus, task: int, chat_format: ChatFormat) -> TaskSurvey:
    """A survey of a task, given by its place in the corpus."""
    store, readable = corpus.admission.store, _readable(corpus, task)
    compared = readable[:COMPARED]
    differing = 0
    for part in np.array_split(compared, max(1, math.ceil(len(compared) / BATCH))):
        rows = [store.row(int(record))[0].tolist() for record in part]
        whole = chat_format.encode_one_string([chat_format.decode(ids) for ids in rows])
        differing += sum(ids != other for ids, other in zip(rows, whole, strict=True))
    return TaskSurvey(corpus.reports[task], store.lengths[readable], len(compared), differing)
