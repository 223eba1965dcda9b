"""Encoded files as one sequence of records: batches of Arrow that are mapped into memory, not read."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from mft_lightning.errors import UserError

DIGEST = b"digest"  # the key of a batch's metadata that tells the digest of its file so far
AROUND = 2 << 20  # bytes that a system may map around what is read: Linux 6.18 maps a whole huge page of the page cache
RELEASE_AFTER = 128 << 20  # bytes that are read, with those around them, before the pages are given back
BATCH = 16 << 20  # bytes of a batch in a file: opening costs some 0.1 ms for each
OPEN_FILES = 1 << 16  # that a process may want to hold; the usual limit of 1024 is there to be raised


class DamagedFile(Exception):
    """A cache file that does not open as what it was written as."""


class ColumnDigest:
    """A digest of the records of a file that does not depend on how they are cut into batches."""

    def __init__(self) -> None:
        self._ids, self._spans, self._lengths = (hashlib.sha256() for _ in range(3))

    def add(self, batch: pa.RecordBatch) -> None:
        ids, spans = batch.column("input_ids"), batch.column("spans")
        counts = np.stack([np.diff(ids.offsets), np.diff(spans.offsets)], axis=1)
        for digest, values in ((self._ids, ids.flatten()), (self._spans, spans.flatten()), (self._lengths, counts)):
            digest.update(np.asarray(values, dtype="<u4").data)

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(part.digest() for part in (self._ids, self._spans, self._lengths))).hexdigest()


@dataclass(frozen=True)
class EncodedFile:
    """A data file with its records.

    Attributes:
        source: the data file that the records were read from.
        batches: of :func:`~mft_lightning.data.encoding.schema`.
        digest: of the records.
        mapped: the memory map that the batches lie in, where they lie in a file.
        path: of that file.
    """

    source: Path
    batches: Sequence[pa.RecordBatch]
    digest: str = ""
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
            if error.errno != errno.EMFILE or not _let_more_files_open():
                raise OSError(error.errno, error.strerror, str(path)) from error
            return cls.open(path, source)
        except ValueError as error:  # nothing is in it
            raise DamagedFile(f"{path}: {error}") from error
        try:
            reader = pa.ipc.open_file(pa.py_buffer(mapped))
            found = [reader.get_batch_with_custom_metadata(number) for number in range(reader.num_record_batches)]
            digest = found[-1].custom_metadata[DIGEST].decode() if found else ColumnDigest().hexdigest()
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedFile(f"{path}: {error}") from error
        return cls(source, [batch.batch for batch in found], digest, mapped, path)

    def __reduce__(self) -> tuple[object, ...]:
        if self.path is None:
            return EncodedFile, (self.source, list(self.batches), self.digest)
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


def write_batches(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    """Write a cache file and have it on the disk; nothing is left of it where that fails.

    Raises:
        UserError: it cannot be written.
    """
    digest = ColumnDigest()
    try:
        with path.open("wb") as handle:
            with pa.ipc.new_file(handle, schema) as writer:
                for batch in _in_batches(batches):
                    digest.add(batch)
                    writer.write_batch(batch, custom_metadata={DIGEST: digest.hexdigest()})
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
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


def _let_more_files_open() -> bool:
    """Raise the number of files that this process may hold open, as every map holds one; whether that was possible."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return False
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft >= most:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return True


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
