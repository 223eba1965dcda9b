"""Markdown whose text stays text: nothing that data or a model says ends a fence or a table, or becomes markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

LEAST_FENCE = 3
_MARKUP = re.compile(r"[^\w ,:;/%()]|_")


def plain(text: str) -> str:
    """Text on one line, as it is: what could be markup as the number of its character."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", " ".join(text.split()))


def fenced(text: str, language: str = "") -> str:
    """A block of text as it is, between fences longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(LEAST_FENCE, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are plain text."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [line if number == 1 else [plain(cell) for cell in line] for number, line in enumerate(lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
