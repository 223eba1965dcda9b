"""The screen: plain tables and sentences that stay whole when piped, and colour where a terminal shows it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

GAP = 2  # columns between those of a table
_WIDE = 10_000  # columns of what is no terminal, so that nothing is folded or cut in a file or a pipe
# Separators that some break lines at, and halves of characters, which stand for bytes of a file name that are no UTF-8.
_ESCAPED = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029, *range(0xD800, 0xE000))}
# control characters, line separators, and marks that turn the direction of what follows
_CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069]")


class Screen(Console):
    """rich's console, for which a reader that left is an error like any other."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Screen:
    """The standard output, as it is now."""
    screen = Screen(markup=False, highlight=False, emoji=False)
    if not screen.is_terminal:
        screen = Screen(markup=False, highlight=False, emoji=False, width=_WIDE)
    return screen


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """``… | head`` closes the pipe when it has enough; that is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes once more, and complains


@dataclass(frozen=True)
class Grid:
    """A table: the first column and those named in ``left`` stand to the left, numbers to the right.

    Where the screen is too narrow it does without what is ``spare``, the first of it first, and says so; its columns
    become rows where that does not help, and each row a paragraph where that does not fit either.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str] = ()
    spare: Sequence[str] = ()

    def __rich_console__(self, screen: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        for folded in (False, True):  # names of columns fold between their words, numbers never
            widths = self._widths(folded)
            if sum(widths) + GAP * len(widths) <= options.max_width:
                yield self._table(widths)
                return
        for count in range(1, len(self.spare) + 1):
            less = self._without(self.spare[:count])
            widths = less._widths(folded=True)
            if sum(widths) + GAP * len(widths) <= options.max_width:
                yield less._table(widths)
                yield Text(f"(a wider screen has {' and '.join(self.spare[:count])} too)")
                return
        turned = Grid(("", *(row[0] for row in self.rows)), list(zip(self.columns, *self.rows, strict=True))[1:])
        widths = turned._widths(folded=False)
        if sum(widths) + GAP * len(widths) <= options.max_width:
            yield turned._table(widths)
            return
        for row in self.rows:
            named = zip(self.columns[1:], row[1:], strict=True)
            yield Text(row[0], style="bold")
            yield Text("  " + ", ".join(f"{name} {cell}" for name, cell in named if cell))

    def _without(self, names: Sequence[str]) -> Grid:
        kept = [number for number, name in enumerate(self.columns) if name not in names]
        return Grid(
            [self.columns[number] for number in kept],
            [[row[number] for number in kept] for row in self.rows],
            self.left,
        )

    def _widths(self, folded: bool) -> list[int]:
        widths = []
        for number, name in enumerate(self.columns):
            words = name.split() if folded else [name]
            widths.append(max(map(cell_len, [*words, *(row[number] for row in self.rows)])))
        return widths

    def _table(self, widths: Sequence[int]) -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
        for number, (name, width) in enumerate(zip(self.columns, widths, strict=True)):
            made.add_column(name, justify="left" if number == 0 or name in self.left else "right", width=width)
        for row in self.rows:
            made.add_row(*row)
        return made


def say(*lines: str | Text | Grid) -> None:
    """Print lines and tables. Lines are broken by the terminal, never by us, so that paths can be copied."""
    screen = console()
    if screen.is_jupyter:  # where rich makes a block of every line, with codes for colours in tables
        screen = Screen(
            markup=False, highlight=False, emoji=False, force_jupyter=False, force_terminal=False, width=_WIDE
        )
    for line in lines:
        if isinstance(line, Grid) and not screen.is_terminal:
            with screen.capture() as captured:
                screen.print(line)
            screen.file.write("".join(row.rstrip() + "\n" for row in captured.get().splitlines()))
        elif isinstance(line, Grid):
            screen.print(line)
        else:
            screen.print(printable(line) if isinstance(line, str) else line, soft_wrap=True)
    screen.file.flush()


def json_line(value: object) -> str:
    """JSON as text that every reader takes for one line and every encoding of Unicode can write."""
    return json.dumps(value, ensure_ascii=False).translate(_ESCAPED)


def print_json(value: object) -> None:
    """Print JSON as one line, with letters spelt out where the standard output's encoding has not all of them."""
    line = json_line(value)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(value)
    print(line, flush=True)


def labelled(lines: Sequence[tuple[str, str]]) -> list[Text]:
    """``label  value`` lines with the values in one column."""
    width = max(len(label) for label, _ in lines)
    return [Text.assemble((f"{label:{width}}  ", "bold"), value) for label, value in lines]


def printable(text: str) -> str:
    """``text`` with control characters spelt out, so that data cannot drive the terminal."""
    return _CONTROL.sub(lambda found: _spelt(ord(found.group())), text)


def _spelt(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def duration(seconds: float) -> str:
    """``1:05`` or ``2:01:05``."""
    text = str(timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0") if text.startswith("0:0") else text.removeprefix("0:")


def shown(path: Path) -> str:
    """A path as one types it here: relative where it lies below the working directory, quoted for the shell."""
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return shlex.quote(str(path))


def program(name: str) -> str:
    """How to call ``name`` of this Python's environment from the shell this was started in."""
    own = Path(sys.executable).parent / name
    found = shutil.which(name)
    return name if found and Path(found) == own else shown(own)
