"""The errors a user is meant to read: what is wrong, where, and what to do about it."""

import difflib
import errno
from collections.abc import Iterable, Sequence

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what no program can write through


class UserError(Exception):
    """Bad input or a setting that cannot work. The command line prints the message alone and exits with 1."""


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the error's kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def misread(values: Sequence[object]) -> str:
    """What to do about names that YAML took for something else than text."""
    names, them = ("a name", "it") if len(values) == 1 else ("names", "them")
    return f"YAML reads {names} as {', '.join(map(repr, values))}. Put {them} in quotes."


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A sentence with the known word that is spelt most alike, from ``cutoff`` on; empty where none is."""
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=cutoff)
    return f" The nearest is {near[0]}." if near else ""


class NotYetError(UserError):
    """A setting whose place is known but which this version does not carry out. It is refused, never ignored."""

    def __init__(self, key: str, value: object, instead: str) -> None:
        super().__init__(f"{key}: {value!r} is not supported yet. {instead}")
