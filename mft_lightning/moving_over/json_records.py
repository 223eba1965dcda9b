"""The records of a JSON Lines file, or of one JSON array of any size, in bounded memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mft_lightning.data.lines import MAX_LINE, read_blocks, read_pieces
from mft_lightning.errors import UserError

_BLANK = re.compile(r"[ \t\r\n]*")
_PIECE = 1 << 18
_LOOKAHEAD = 12  # letters that json reads at once: two escapes of a surrogate pair


@dataclass(frozen=True)
class Record:
    """A record of a file.

    Attributes:
        raw: its text, in UTF-8.
        file: that it is of.
        line: where it begins.
        element: which of an array's it is, from 1 on; None of a record that is a line.
        position: the bytes of the file that were read by now.
    """

    raw: bytes
    file: Path
    line: int
    element: int | None
    position: int

    @property
    def where(self) -> str:
        """What messages call it: an array may be one line."""
        return f"{self.file}:{self.line}{f' (record {self.element})' if self.element else ''}"


def read_records(file: Path) -> Iterator[Record]:
    """The records of a file.

    Args:
        file: whose first sign that is not blank tells an array from lines; plain, ``.gz`` or ``.zst``.

    Raises:
        UserError: the file cannot be read, or is an array that is damaged or holds something else than objects.
    """
    if _is_array(file):
        yield from _Array(file).elements()
        return
    for block in read_blocks(file):
        for line in block.lines():
            yield Record(line.raw, line.file, line.number, None, block.position)


def _is_array(file: Path) -> bool:
    for piece, _ in read_pieces(file, 4096):
        if begin := piece.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n"):
            return begin.startswith(b"[")
    return False


class _Array:
    """Reads an array element by element."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.pieces = read_pieces(file, _PIECE)
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.json = json.JSONDecoder()
        self.text, self.at = "", 0
        self.line, self.element, self.position = 1, 1, 0
        self.ended = False

    def fail(self, what: str, line: int | None = None) -> UserError:
        place = f"{self.file}:{self.line if line is None else line} (record {self.element})"
        return UserError(f"{place}: {what}")

    def elements(self) -> Iterator[Record]:
        self._expect("[")
        if self._next() == "]":
            self._step(self.at + 1)
        else:
            while True:
                yield self._element()
                if self._next() == "]":
                    self._step(self.at + 1)
                    break
                self._expect(",")
                self.element += 1
        if self._next():
            raise self.fail("something follows the array. Take it away.")

    def _element(self) -> Record:
        if (sign := self._next()) != "{":
            what = "a comma stands before its end" if sign == "]" else "it holds something that is no object"
            raise self.fail(f"the array is not as it must be: {what if sign else 'the file ends in it'}. Mend it.")
        while True:
            try:
                _, end = self.json.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                last = len(self.text.rstrip()) if self.ended else len(self.text) - _LOOKAHEAD
                cut = error.pos >= last or error.msg.startswith("Unterminated string")
                long = len(self.text) - self.at > MAX_LINE
                if cut and not self.ended and not long:
                    self._more(len(self.text) - self.at)
                    continue
                number = self.line + self.text.count("\n", self.at, error.pos)
                what = f"has a record longer than {MAX_LINE >> 20} MiB" if long else "ends in the middle of a record"
                raise self.fail(f"{what if cut else f'is not valid JSON ({error.msg})'}. Mend it.", number) from error
            except (RecursionError, ValueError) as error:
                raise self.fail("is not valid JSON (nested too deeply, or a number that is too long).") from error
            else:
                raw = self.text[self.at : end].encode("utf-8", "surrogatepass")
                record = Record(raw, self.file, self.line, self.element, self.position)
                self._step(end)
                return record

    def _next(self) -> str:
        """The next sign that is not blank; nothing at the end."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            assert blank is not None
            self._step(blank.end())
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._more(1)

    def _expect(self, sign: str) -> None:
        found = self._next()
        if found != sign:
            what = f"{found!r} stands" if found else "the file ends"
            raise self.fail(f"{what} where {sign!r} must stand in an array. Mend it.")
        self._step(self.at + 1)

    def _step(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _more(self, at_least: int) -> None:
        """Have more of the text, and forget what was read."""
        gathered = [self.text[self.at :]]
        read = 0
        while read < at_least and not self.ended:
            piece, position = next(self.pieces, (b"", self.position))
            self.ended, self.position = not piece, position
            try:
                gathered.append(self.decoder.decode(piece, final=self.ended))
            except UnicodeDecodeError as error:
                raise self.fail("is not UTF-8 from here on. Save it as UTF-8.") from error
            read += len(piece)
        self.text, self.at = "".join(gathered), 0
