"""Tables of conversations made by hand, and task directories loaded as a run loads them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa

from mft_lightning.data.admission import RecordPolicy, TaskReport
from mft_lightning.data.chat_encoder import Encoded
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.corpus import Corpus, load_corpus
from mft_lightning.data.encoding import digest_of
from mft_lightning.data.splits import SPLITS
from mft_lightning.data.tasks import Task
from mft_lightning.data.token_cache import CacheSettings, TokenCache
from mft_lightning.data.token_store import EncodedFile, TokenStore, schema
from mft_lightning.data.token_table import RecordTable, TokenTable


def masked(input_ids: list[int], supervised: Sequence[int]) -> Encoded:
    """Ids with the spans that a mask says."""
    spans, place = [], 0
    for value, run in groupby(supervised):
        length = len(list(run))
        spans += [place, place + length] if value else []
        place += length
    return Encoded(input_ids, spans)


def store_of(conversations: Sequence[Encoded], batch: int = 3) -> TokenStore:
    """A store in memory, in batches of so many records."""
    form = schema("uint16")
    batches = [
        pa.RecordBatch.from_pylist(
            [
                {
                    "line": start + place + 1,
                    "input_ids": e.input_ids,
                    "spans": e.spans,
                    "digest": digest_of(e.input_ids, e.spans),
                }
                for place, e in enumerate(conversations[start : start + batch])
            ],
            form,
        )
        for start in range(0, len(conversations), batch)
    ]
    return TokenStore([EncodedFile(Path("made.jsonl"), batches)])


def table_of(rows: Sequence[tuple[int, Encoded]]) -> RecordTable:
    """A table of (task number, encoded conversation) rows."""
    store = store_of([encoded for _, encoded in rows])
    tasks = np.array([task for task, _ in rows], dtype=np.int64)
    return RecordTable(store, np.arange(len(rows)), store.lengths, tasks, store.n_supervised)


def loaded(
    tasks: Sequence[Task], shares: Sequence[float], chat_format: ChatFormat, policy: RecordPolicy, cache_dir: Path
) -> Corpus:
    """Task directories, tokenised by one process; raises as a run does."""
    cache = TokenCache(CacheSettings(directory=cache_dir, processes=1), chat_format)
    corpus = load_corpus(tasks, range(len(tasks)), shares, cache, policy, 42)
    corpus.refuse()
    return corpus


def split_tables(corpus: Corpus) -> tuple[dict[str, TokenTable], list[TaskReport]]:
    return {split: corpus.table(split) for split in SPLITS}, corpus.reports
