"""The screen: plain tables and sentences that stay whole when piped, and colour where a terminal shows it."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

GAP = 2  # columns between those of a table
_WIDE = 10_000  # columns of what is no terminal, so that nothing is folded or cut in a file or a pipe
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def console() -> Console:
    """The standard output, as it is now."""
    screen = Console(markup=False, highlight=False, emoji=False)
    if not screen.is_terminal:
        screen = Console(markup=False, highlight=False, emoji=False, width=_WIDE)
    return screen


@dataclass(frozen=True)
class Grid:
    """A table: the first column and those named in ``left`` stand to the left, numbers to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str] = ()

    def __rich_console__(self, screen: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """As a table, or, where the screen is too narrow for its numbers, as a paragraph for each row."""
        cells = [[row[number] for row in self.rows] for number in range(len(self.columns))]
        space = options.max_width - GAP * len(self.columns)
        widths = [max(map(len, [*column, name])) for column, name in zip(cells, self.columns, strict=True)]
        if sum(widths) > space:  # the names of the columns are folded between their words
            widths = [max(map(len, [*column, *name.split()])) for column, name in zip(cells, self.columns, strict=True)]
        if sum(widths) > space:
            for row in self.rows:
                named = zip(self.columns[1:], row[1:], strict=True)
                yield Text(row[0], style="bold")
                yield Text("  " + ", ".join(f"{name} {cell}" for name, cell in named if cell))
            return
        made = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
        for number, (name, width) in enumerate(zip(self.columns, widths, strict=True)):
            made.add_column(name, justify="left" if number == 0 or name in self.left else "right", width=width)
        for row in self.rows:
            made.add_row(*row)
        yield made


def say(*lines: str | Text | Grid) -> None:
    """Print lines and tables. Lines are broken by the terminal, never by us, so that paths can be copied."""
    screen = console()
    for line in lines:
        screen.print(line, soft_wrap=not isinstance(line, Grid))
    screen.file.flush()


def labelled(lines: Sequence[tuple[str, str]]) -> list[Text]:
    """``label  value`` lines with the values in one column."""
    width = max(len(label) for label, _ in lines)
    return [Text.assemble((f"{label:{width}}  ", "bold"), value) for label, value in lines]


def printable(text: str) -> str:
    """``text`` with control characters spelt out, so that data cannot drive the terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


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
