"""Files to lines: ``*.jsonl``, plain or compressed by gzip or zstd, read in bounded memory.

Worker processes import this module, so it needs neither torch nor transformers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from gzip import GzipFile
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from mft_lightning.errors import UserError, first_line

MAX_LINE = 8 << 20  # bytes of a line before its LF
_BOM = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A line that is not blank: where it stands and its bytes, without the line end and blanks around it.

    Of a line longer than ``MAX_LINE`` there are the first ``MAX_LINE + 1`` bytes as they stand.
    """

    file: Path
    number: int
    raw: bytes


@dataclass(frozen=True)
class Block:
    """Whole lines of a file, one after the other.

    Attributes:
        file: the file they are of.
        first: the number of the first line, from 1.
        raw: the lines, each with its LF but perhaps the file's last.
        position: bytes of the file as it lies on disk that were read by now, for a progress bar; 0 of a pipe.
    """

    file: Path
    first: int
    raw: bytes
    position: int

    def lines(self) -> Iterator[Line]:
        """The lines that are not blank; a byte order mark at the start of the file and CRLF are taken off."""
        for number, raw in enumerate(self.raw.split(b"\n"), start=self.first):
            if len(raw) <= MAX_LINE:  # else what was cut off may be more than blanks
                if number == 1:
                    raw = raw.removeprefix(_BOM)
                raw = raw.strip(b" \t\r")
            if raw:
                yield Line(self.file, number, raw)


def read_lines(file: Path) -> Iterator[Line]:
    """The lines of ``file`` that are not blank, numbered from 1.

    Raises:
        UserError: the file cannot be read.
    """
    for block in read_blocks(file):
        yield from block.lines()


def read_blocks(file: Path, size: int = 1 << 18) -> Iterator[Block]:
    """The whole of ``file`` in blocks of about ``size`` bytes, at most about ``2 * MAX_LINE``.

    A line is never split over two blocks. One longer than ``MAX_LINE`` is cut to its first ``MAX_LINE + 1`` bytes.

    Raises:
        UserError: the file cannot be opened, or its compressed data is damaged or cut off.
    """
    first = 1
    for raw, position in _whole_lines(read_pieces(file, min(size, MAX_LINE))):
        yield Block(file, first, raw, position)
        first += raw.count(b"\n")


def read_pieces(file: Path, size: int) -> Iterator[tuple[bytes, int]]:
    """The whole of ``file``, uncompressed, in pieces of ``size`` bytes, each with the bytes read of the disk by now.

    Raises:
        UserError: the file cannot be opened, or its compressed data is damaged or cut off.
    """
    try:
        with file.open("rb") as disk, _decompressed(file, disk) as stream:
            while piece := stream.read(size):
                yield piece, disk.tell() if disk.seekable() else 0
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{file}: cannot be read ({error.strerror}). Give a file that can.") from error
        raise UserError(
            f"{file}: cannot be read ({first_line(error)}). Copy or compress it again (zstd: --long=27 at most)."
        ) from error


@contextmanager
def _decompressed(file: Path, disk: BufferedReader) -> Iterator[Any]:
    """What ``disk`` holds, as something to ``read`` from."""
    if file.suffix in (".gz", ".zst") and not disk.peek(1):
        raise EOFError("it holds nothing, and a compressed file never does")
    if file.suffix == ".gz":
        with GzipFile(fileobj=disk) as stream:
            yield stream
    elif file.suffix == ".zst":
        from pyarrow import CompressedInputStream  # takes a third of a second

        with CompressedInputStream(disk, "zstd") as stream:
            yield stream
    else:
        yield disk


def _whole_lines(pieces: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """Pieces of bytes, each completed to whole lines, with the place on the disk."""
    rest, position = b"", 0  # of a line whose end is still to come
    for piece, position in pieces:
        start, end = piece.find(b"\n"), piece.rfind(b"\n") + 1
        if end:
            # only the line that `rest` began can be too long: the others lie in one piece
            yield (rest + piece[:start])[: MAX_LINE + 1] + piece[start:end], position
            rest = piece[end:]
        elif len(rest) <= MAX_LINE:
            rest = (rest + piece)[: MAX_LINE + 1]
    if rest:
        yield rest, position
