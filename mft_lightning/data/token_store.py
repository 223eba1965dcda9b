"""Encoded files as one sequence of records: batches of Arrow that are mapped into memory, not read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from mft_lightning.errors import UserError

AROUND = 2 << 20  # bytes that a system may map around what is read: Linux 6.18 maps a whole huge page of the page cache
RELEASE_AFTER = 128 << 20  # bytes that are read, with those around them, before the pages are given back
BATCH = 16 << 20  # bytes of a batch in a file: opening costs some 0.1 ms for each
OPEN_FILES = 1 << 16  # that a process may want to hold; the usual limit of 1024 is there to be raised


class DamagedFile(Exception):
    """A cache file that does not open as what it was written as."""


def schema(id_type: str) -> pa.Schema:
    """The columns of a batch, a row for every line that is not blank.

    ``line`` is its number in the file, ``input_ids`` its tokens, ``spans`` the flat ``[start, end, …]`` places of those
    that are supervised, and ``digest`` tells these from others; of a line that is no usable conversation there is no
    token, but ``reason`` and ``detail``.
    """
    ids = pa.list_(pa.field("item", pa.type_for_alias(id_type), nullable=False))
    spans = pa.list_(pa.field("item", pa.int32(), nullable=False))
    return pa.schema(
        [
            pa.field("line", pa.int64(), nullable=False),
            pa.field("input_ids", ids, nullable=False),
            pa.field("spans", spans, nullable=False),
            pa.field("digest", pa.uint64(), nullable=False),
            pa.field("reason", pa.string()),
            pa.field("detail", pa.string()),
        ]
    )


@dataclass(frozen=True)
class EncodedFile:
    """A data file with its records.

    Attributes:
        source: the data file that the records were read from.
        batches: of :func:`schema`.
        mapped: the memory map that the batches lie in, where they lie in a file.
        path: of that file.
    """

    source: Path
    batches: Sequence[pa.RecordBatch]
    mapped: mmap.mmap | None = None
    path: Path | None = None

    @classmethod
    def open(cls, path: Path, source: Path) -> Self:
        """Map a cache file.

        Raises:
            DamagedFile: it is not whole.
            OSError: it is gone or may not be read.
        """
        try:
            mapped = _mapped(path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        except ValueError as error:  # nothing is in it
            raise DamagedFile(f"{path}: {error}") from error
        try:
            reader = pa.ipc.open_file(pa.py_buffer(mapped))
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DamagedFile(f"{path}: {error}") from error
        if reader.schema not in (schema("uint16"), schema("uint32")):
            raise DamagedFile(f"{path}: has other columns")
        return cls(source, batches, mapped, path)

    def __reduce__(self) -> tuple[object, ...]:
        if self.path is None:
            return EncodedFile, (self.source, list(self.batches))
        return EncodedFile.open, (self.path, self.source)


class TokenStore:
    """The records of some files, end to end, numbered from 0; those that could not be read are empty ones.

    Args:
        files: in order.

    Attributes:
        first: ``int64 [files + 1]``, the first record of each file.
        lengths: ``int32 [records]``, tokens of each.
        n_supervised: ``int32 [records]``, supervised tokens of each.
        unusable: ``int64 [bad]``, the records that are no usable conversation.
    """

    def __init__(self, files: Sequence[EncodedFile]) -> None:
        self.files = list(files)
        batches = [batch for file in files for batch in file.batches]
        self._batches = batches
        self._starts = np.cumsum([0, *(len(batch) for batch in batches)], dtype=np.int64)
        self.first = np.cumsum([0, *(sum(map(len, file.batches)) for file in files)], dtype=np.int64)
        self._ids = [(_view(column.values), _view(column.offsets)) for column in _columns(batches, "input_ids")]
        self._spans = [(_view(column.values), _view(column.offsets)) for column in _columns(batches, "spans")]
        self._digests = [_view(batch.column("digest")) for batch in batches]
        self.lengths = _joined([np.diff(offsets) for _, offsets in self._ids])
        self.n_supervised = _joined([_supervised(values, offsets) for values, offsets in self._spans])
        bad = [
            start + _places_given(batch.column("reason")) for start, batch in zip(self._starts, batches, strict=False)
        ]
        self.unusable = np.concatenate(bad) if bad else np.empty(0, dtype=np.int64)
        self.release()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type[TokenStore], tuple[list[EncodedFile]]]:
        return type(self), (self.files,)

    def row(self, record: int) -> tuple[np.ndarray, np.ndarray]:
        """A record's token ids ``[length]`` and its flat supervised spans ``[2 * stretches]``, as views of the file."""
        if self._read > RELEASE_AFTER:
            self.release()
        batch, place = self._find(record)
        ids, spans = _slice(self._ids[batch], place), _slice(self._spans[batch], place)
        self._read += ids.nbytes + AROUND
        return ids, spans

    def supervised_within(self, length: int) -> np.ndarray:
        """Supervised tokens among the first ``length`` of each record, ``int32 [records]``."""
        cut = [_supervised(np.minimum(values, length), offsets) for values, offsets in self._spans]
        self.release()
        return _joined(cut)

    def first_ends(self) -> np.ndarray:
        """Where the first supervised stretch of each record ends, ``int32 [records]``; 0 where there is none."""
        ends = [_first_ends(values, offsets) for values, offsets in self._spans]
        self.release()
        return _joined(ends)

    def digests(self, records: np.ndarray) -> np.ndarray:
        """What tells the tokens and the supervision of records from others, ``uint64 [records]``."""
        batch_of = np.searchsorted(self._starts, records, side="right") - 1
        found = np.empty(len(records), dtype=np.uint64)
        for batch in np.unique(batch_of):
            chosen = batch_of == batch
            found[chosen] = self._digests[batch][records[chosen] - self._starts[batch]]
        return found

    def where(self, record: int) -> tuple[Path, int]:
        """The file and line of a record."""
        batch, place = self._find(record)
        return self.files[self.file_of(record)].source, self._batches[batch].column("line")[place].as_py()

    def refusal(self, record: int) -> tuple[str, str]:
        """The reason and the detail of a record that is no usable conversation."""
        batch, place = self._find(record)
        found = self._batches[batch]
        return found.column("reason")[place].as_py(), found.column("detail")[place].as_py()

    def file_of(self, record: int) -> int:
        """The number of the file that a record stands in."""
        return int(np.searchsorted(self.first, record, side="right")) - 1

    def release(self) -> None:
        """Give back the pages that were read; they are read again where they are needed.

        The system keeps mapped pages as long as memory lasts, and shows them as this process's.
        """
        self._read = 0
        for file in self.files:
            if file.mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                file.mapped.madvise(mmap.MADV_DONTNEED)

    def _find(self, record: int) -> tuple[int, int]:
        batch = int(np.searchsorted(self._starts, record, side="right")) - 1
        return batch, int(record - self._starts[batch])


def write_batches(path: Path, form: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    """Write a cache file and have it on the disk; nothing is left of it where that fails.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with path.open("wb") as handle:
            with pa.ipc.new_file(handle, form) as writer:
                for batch in _in_batches(batches):
                    writer.write_batch(batch)
            handle.flush()
            os.fsync(handle.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(path.parent, error) from error
        raise


def unwritable(directory: Path, error: OSError) -> UserError:
    """What a user reads where the cache cannot be written."""
    why = error.strerror or error
    return UserError(f"data.cache_dir: {directory} cannot be written ({why}). Give another one, or make room there.")


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as handle:
        _leave_room()
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


def _leave_room() -> None:
    """Let this process hold as many files open as it may: every map holds one, beside all else that a run opens."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):  # macOS has a lower limit that it does not tell; then the usual one stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _columns(batches: Sequence[pa.RecordBatch], name: str) -> Iterator[pa.ListArray]:
    return (batch.column(name) for batch in batches)


def _in_batches(parts: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of at least ``BATCH`` bytes, all but the last."""
    waiting: list[pa.RecordBatch] = []
    size = 0
    for part in parts:
        waiting.append(part)
        size += part.nbytes
        if size >= BATCH:
            yield pa.concat_batches(waiting)
            waiting, size = [], 0
    if waiting:
        yield pa.concat_batches(waiting)


def _view(numbers: pa.Array) -> np.ndarray:
    """The numbers where they lie; Arrow's own ``to_numpy`` imports pandas where there is one, half a second."""
    if not len(numbers):
        return np.empty(0, dtype=str(numbers.type))
    return np.frombuffer(numbers.buffers()[1], dtype=str(numbers.type))[numbers.offset :][: len(numbers)]


def _places_given(column: pa.Array) -> np.ndarray:
    """Where a column has a value."""
    bitmap = column.buffers()[0]
    if bitmap is None:  # it has one everywhere
        return np.arange(len(column))
    return np.flatnonzero(
        np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")[column.offset :][: len(column)]
    )


def _slice(column: tuple[np.ndarray, np.ndarray], place: int) -> np.ndarray:
    values, offsets = column
    return values[offsets[place] : offsets[place + 1]]


def _supervised(spans: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Supervised tokens of each record of a batch."""
    ends = np.concatenate([[0], np.cumsum(spans[1::2] - spans[::2])])
    return ends[offsets[1:] // 2] - ends[offsets[:-1] // 2]


def _first_ends(spans: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The end of the first supervised stretch of each record of a batch, or 0."""
    ends = np.zeros(len(offsets) - 1, dtype=np.int32)
    some = offsets[1:] > offsets[:-1]
    ends[some] = spans[offsets[:-1][some] + 1]
    return ends


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int32, copy=False) if parts else np.empty(0, dtype=np.int32)
