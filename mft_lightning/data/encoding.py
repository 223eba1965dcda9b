"""Blocks of lines to batches of Arrow, in this process or in several. Nothing here imports torch or transformers."""

from __future__ import annotations

import gc
import hashlib
import os
import pickle
import signal
import sys
from array import array
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa

from mft_lightning.data.chat_encoder import ChatEncoder, Segment
from mft_lightning.data.lines import Block
from mft_lightning.data.records import BadRecord, parse_record
from mft_lightning.data.token_store import schema, unwritable
from mft_lightning.data.workers import serve_parent
from mft_lightning.errors import UserError

WAITING = 3  # blocks that are read ahead for each process, so that none waits for its next one


def digest_of(input_ids: Sequence[int], spans: Sequence[int]) -> int:
    """Tells records apart that differ in a token or its supervision: 64 bits, whatever the machine and the id type."""
    told = array("I", [len(input_ids)]) + array("I", input_ids) + array("I", spans)
    if sys.byteorder == "big":
        told.byteswap()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little")


@contextmanager
def _uncollected() -> Iterator[None]:
    """Python looks for no cycles meanwhile: what a line is read as has none, and looking takes a tenth of the time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@_uncollected()
def encode_block(block: Block, encoder: ChatEncoder, id_type: str) -> pa.RecordBatch:
    """Every line of a block as a row of :func:`~mft_lightning.data.token_store.schema`, in order; none is left out.

    Args:
        block: whole lines of a file.
        encoder: of conversations.
        id_type: ``uint16`` or ``uint32``, of the token ids.
    """
    numbers, reasons, details, conversations = array("q"), [], [], []
    for line in block.lines():
        segments: list[Segment] = []
        reason = detail = None
        try:
            segments = list(encoder.segments(parse_record(line.raw)))
        except BadRecord as error:
            reason, detail = error.reason, error.detail
        numbers.append(line.number)
        reasons.append(reason)
        details.append(detail)
        conversations.append(segments)
    ids, spans, digests = array("I"), array("i"), array("Q")
    id_ends, span_ends = array("i", [0]), array("i", [0])
    for encoded in encoder.encode_segments(conversations):
        own = array("I", encoded.input_ids)
        ids += own
        spans.fromlist(encoded.spans)
        digests.append(digest_of(own, encoded.spans))
        id_ends.append(len(ids))
        span_ends.append(len(spans))
    form = schema(id_type)
    columns = [
        pa.array(np.asarray(numbers)),
        pa.ListArray.from_arrays(
            np.asarray(id_ends), pa.array(np.asarray(ids, id_type)), type=form.field("input_ids").type
        ),
        pa.ListArray.from_arrays(np.asarray(span_ends), pa.array(np.asarray(spans)), type=form.field("spans").type),
        pa.array(np.asarray(digests)),
        pa.array(reasons, pa.string()),
        pa.array(details, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=form)


def encode_blocks(
    blocks: Iterable[Block], encoder: ChatEncoder, id_type: str, processes: int, told: Path
) -> Generator[tuple[Block, pa.RecordBatch]]:
    """Every block with its batch, in order.

    Args:
        blocks: read ahead by a few for each process, never all at once.
        encoder: of conversations; pickled where there are several processes.
        id_type: ``uint16`` or ``uint32``.
        processes: that share the work; 1 is this one.
        told: a file that is written for other processes to read, and removed at the end.

    Raises:
        UserError: a process could not be started, or was ended from outside.
    """
    encode = partial(encode_block, encoder=encoder, id_type=id_type)
    if processes == 1:
        for block in blocks:
            yield block, encode(block)
        return
    # In a file: what a process is given at its start goes through a pipe, and where that process ends before it has
    # read more than a pipe holds, multiprocessing waits for ever (popen_spawn_posix.py, _launch).
    try:
        try:
            told.write_bytes(pickle.dumps(encode))
        except OSError as error:
            raise unwritable(told.parent, error) from error
        pool = ProcessPoolExecutor(processes, get_context("spawn"), _start_process, (told,))
        yield from _encode_in(pool, blocks, processes)
    finally:
        told.unlink(missing_ok=True)


def _encode_in(
    pool: ProcessPoolExecutor, blocks: Iterable[Block], processes: int
) -> Generator[tuple[Block, pa.RecordBatch]]:
    waiting: deque[tuple[Block, Future[pa.RecordBatch]]] = deque()
    try:
        for block in blocks:
            waiting.append((block, _submitted(pool, block)))
            if len(waiting) > WAITING * processes:
                block, batch = waiting.popleft()
                yield block, batch.result()
        for block, batch in waiting:
            yield block, batch.result()
    except BrokenProcessPool as error:
        raise UserError(
            "data.preprocessing_num_workers: a process that encoded could not start, as it says above, or was ended "
            f"from outside, perhaps for want of memory. Give fewer than {processes}."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, block: Block) -> Future[pa.RecordBatch]:
    try:
        with _without_main():
            return pool.submit(_encode_there, block)
    except OSError as error:  # it starts a process where none is idle
        raise UserError(
            f"data.preprocessing_num_workers: a process could not be started ({error.strerror}). Give fewer."
        ) from error


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that start meanwhile do not run the user's script again, of which they need nothing.

    multiprocessing has each import what ``__main__`` was read from (``spawn.py``, ``get_preparation_data``), so that a
    script that is not written for it would begin its run anew in each.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_encode: partial[pa.RecordBatch]  # of a process that encodes


def _start_process(told: Path) -> None:
    """What a process that encodes is told once: the encoder. It leaves Ctrl-C to its parent, and ends with it."""
    global _encode
    _encode = pickle.loads(told.read_bytes())
    # The processes are the parallelism, but the library's own thread is a third faster than this one: what it allocates
    # it takes from a heap that nothing else is in.
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS="1")
    serve_parent(signal.SIGINT)


def _encode_there(block: Block) -> pa.RecordBatch:
    return _encode(block)
