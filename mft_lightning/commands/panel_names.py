"""Names of tasks as titles of narrow panels: cut, and still told apart."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix

CUT = "…"


def panel_names(names: Sequence[str], limit: int) -> list[str]:
    """Titles of at most ``limit`` characters for different names, in the same order and all different.

    Longer ones are cut in the middle, because names of tasks often begin alike. Where that makes two of them equal,
    what all have in common at their beginnings and ends is cut first; where that is not enough they are numbered.
    """
    for shown in (names, _without_common(names)):
        titles = [_without_middle(name, limit) for name in shown]
        if len(set(titles)) == len(titles):
            return titles
    numbers = [f"{number} " for number in range(1, len(names) + 1)]
    return [number + _without_middle(name, limit - len(number)) for number, name in zip(numbers, names, strict=True)]


def _without_middle(name: str, limit: int) -> str:
    return name if len(name) <= limit else f"{name[: (limit - 1) // 2]}{CUT}{name[-(limit // 2) :]}"


def _without_common(names: Sequence[str]) -> list[str]:
    start = _common(names)
    rest = [name[start:] for name in names]
    end = _common([name[::-1] for name in rest])
    return [(CUT if start else "") + name[: len(name) - end] + (CUT if end else "") for name in rest]


def _common(names: Sequence[str]) -> int:
    """How many characters all begin with."""
    return len(commonprefix(list(names)))  # noqa: RUF071 - characters are what is meant
