"""What ``[ ... ]`` and ``[[ ... ]]`` come to, where that is known without running the script."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence

from mft_lightning.moving_over.shell_expansion import open_names

_WHOLE = re.compile(r"[+-]?\d+")
_COMPARED: dict[str, Callable[[int, int], bool]] = {
    "-eq": operator.eq,
    "-ne": operator.ne,
    "-lt": operator.lt,
    "-le": operator.le,
    "-gt": operator.gt,
    "-ge": operator.ge,
}


def holds(texts: Sequence[str], *, conjunction: str, disjunction: str) -> bool | None:
    """Whether a condition holds.

    Args:
        texts: its words, expanded.
        conjunction: the word that means and.
        disjunction: the word that means or.

    Returns:
        None where that is not known: a file is asked for, or a variable that is open.
    """
    return any_of(
        [all_of([_term(term) for term in _apart(either, conjunction)]) for either in _apart(texts, disjunction)]
    )


def all_of(results: Sequence[bool | None]) -> bool | None:
    return False if False in results else None if None in results else True


def any_of(results: Sequence[bool | None]) -> bool | None:
    return True if True in results else None if None in results else False


def _apart(texts: Sequence[str], by: str) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for text in texts:
        if text == by:
            found.append([])
        else:
            found[-1].append(text)
    return found


def _term(texts: Sequence[str]) -> bool | None:
    """One comparison."""
    if texts[:1] == ["!"]:
        result = _term(texts[1:])
        return None if result is None else not result
    if any(open_names(text) for text in texts):
        return None
    match texts:
        case [text]:
            return bool(text)
        case ["-z" | "-n" as how, text]:
            return (text == "") == (how == "-z")
        case [left, "=" | "==" | "!=" as how, right] if not re.search(r"[*?\[]", right):
            return (left == right) == (how != "!=")
        case [left, how, right] if how in _COMPARED and _WHOLE.fullmatch(left) and _WHOLE.fullmatch(right):
            return _COMPARED[how](int(left), int(right))
    return None
