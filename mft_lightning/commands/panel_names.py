"""Names of tasks as titles of narrow panels: cut, and still told apart."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count, groupby
from os.path import commonprefix

CUT = "…"


def panel_names(names: Sequence[str], limit: int) -> list[str]:
    """Names of at most ``limit`` characters, in the same order and all different.

    Longer ones are cut in the middle, because names of tasks often begin alike. Those that this makes equal are cut in
    another of ``_WAYS``, the first that tells them apart; where none does they are numbered by their place.
    """
    shown = [_without_middle(name, limit) for name in names]
    for way in _WAYS:
        for alike in _equal(shown):
            tried = way([names[place] for place in alike], limit)
            others = {title for place, title in enumerate(shown) if place not in alike}
            fit = all(len(title) <= limit for title in tried)
            if fit and len(set(tried)) == len(tried) and others.isdisjoint(tried):
                for place, title in zip(alike, tried, strict=True):
                    shown[place] = title
    for alike in _equal(shown):
        for place in alike:
            shown[place] = _numbered(names[place], limit, place + 1, shown)
    return shown


def _equal(shown: Sequence[str]) -> list[list[int]]:
    """The places of each title that stands at more than one."""
    places = defaultdict(list)
    for place, title in enumerate(shown):
        places[title].append(place)
    return [alike for alike in places.values() if len(alike) > 1]


def _without_middle(name: str, limit: int) -> str:
    return name if len(name) <= limit else f"{name[: (limit - 1) // 2]}{CUT}{name[-(limit // 2) :]}"


def _without_ends(names: Sequence[str], limit: int) -> list[str]:
    return [name if len(name) <= limit else name[: limit - 1] + CUT for name in names]


def _without_beginnings(names: Sequence[str], limit: int) -> list[str]:
    return [name if len(name) <= limit else CUT + name[1 - limit :] for name in names]


def _words_that_differ(names: Sequence[str], limit: int) -> list[str]:
    """Without the words that stand at the same place in all of them."""
    split = [re.split(r"(?<=[ _.+-])", name) for name in names]
    if len({len(words) for words in split}) > 1:
        return list(names)
    common = [len(set(words)) == 1 for words in zip(*split, strict=True)]
    return [
        "".join(
            CUT if left_out else "".join(word for _, word in run)
            for left_out, run in groupby(zip(common, words, strict=True), key=lambda pair: pair[0])
        )
        for words in split
    ]


def _around_the_difference(names: Sequence[str], limit: int) -> list[str]:
    """The stretch of each in which the first place lies where they differ."""
    room = limit - 2 * len(CUT)
    start, end = (len(commonprefix(either)) for either in (names, [name[::-1] for name in names]))  # noqa: RUF071
    differs = max(map(len, names)) - start - end
    first = max(0, start - max(0, room - differs) // 2)
    return [
        (CUT if first else "") + name[first : first + room] + (CUT if first + room < len(name) else "")
        for name in names
    ]


_WAYS: tuple[Callable[[Sequence[str], int], list[str]], ...] = (
    _without_ends,
    _without_beginnings,
    _words_that_differ,
    _around_the_difference,
)


def _numbered(name: str, limit: int, place: int, taken: Sequence[str]) -> str:
    titles = ((_without_middle(name, limit - len(f" ({n})")) + f" ({n})") for n in count(place))
    return next(title for title in titles if title not in taken)
