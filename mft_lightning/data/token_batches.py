"""Conversations into batches that a token budget nearly fills and that never exceed it.

A conversation longer than the budget stands alone. The others go longest first, each to the batch with the fewest
tokens so far; the number of batches is chosen so that this keeps every batch within the budget.

Whole numbers and unique sort keys only: every rank makes the same batches for itself, on whatever processor.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from math import ceil, floor

import numpy as np

ROOM = 0.98  # of the budget that batches are to fill, so that they can be filled in many ways
LEAST = 0.97  # of the budget, where ROOM would take one batch more
MANY = 2_000_000  # conversations, of which packing one by one takes longer than it is worth
FEW = 100  # batches, of which one more is a share that exchanges between the heaviest and the lightest can save
SPREADS = (256, 64, 16, 0)  # of 256: how far the order may be from longest first, tried in turn
_SHUFFLE = 3  # a word of the seeds here that no other draw of the plan has


def count_batches(lengths: np.ndarray, budget: int) -> int:
    """The fewest batches, from a budget filled to about 98% on, that hold conversations of these lengths.

    Args:
        lengths: tokens of each conversation, ``[conversations]``.
        budget: most tokens of a batch.
    """
    lengths = lengths.astype(np.int64, copy=False)
    alone = lengths > budget
    rest = np.sort(lengths[~alone])[::-1]
    return int(alone.sum()) + (_fewest(rest, budget) if len(rest) else 0)


def fill_batches(lengths: np.ndarray, budget: int, batches: int, seed: list[int]) -> np.ndarray | None:
    """The batch of each conversation, ``int64 [conversations]``, none of the batches empty; None where it fails.

    Args:
        lengths: tokens of each conversation in an order that is random already, ``[conversations]``.
        budget: most tokens of a batch.
        batches: how many; of ``count_batches`` it never fails.
        seed: of the variety from epoch to epoch.
    """
    lengths = lengths.astype(np.int64, copy=False)
    alone = np.flatnonzero(lengths > budget)
    rest = np.flatnonzero(lengths <= budget) if len(alone) else None
    short = lengths if rest is None else lengths[rest]
    slots = batches - len(alone)
    if len(short) < slots or slots < bool(len(short)):
        return None
    rng = np.random.default_rng([*seed, _SHUFFLE])
    for spread in SPREADS:
        # With spread, conversations of unlike length change places, so that other ones come together in every epoch.
        order = _descending(short * (256 + rng.integers(0, spread + 1, len(short))))
        shared = _lightest(short[order], slots, budget)
        if shared is not None:
            break
    else:
        order = _descending(short)
        shared = _tightest(short[order], slots, budget)
        if shared is None:
            return None
        shared = _none_empty(shared, slots)
    labels = rng.permutation(batches)
    found = np.empty(len(lengths), dtype=np.int64)
    found[order if rest is None else rest[order]] = labels[shared]
    found[alone] = labels[slots:]
    return found


def _fewest(longest_first: np.ndarray, budget: int) -> int:
    """As many as the lightest rule needs or, where these are filled too little, as tight packing does."""
    enough = _fewest_level(longest_first, budget)
    tokens = int(longest_first.sum()) / budget
    if tokens / enough < LEAST and ceil(tokens) < enough and len(longest_first) <= MANY:
        tightest = _tightest(longest_first, enough, budget)
        enough = enough if tightest is None else int(tightest.max()) + 1
    return enough


def _fewest_level(longest_first: np.ndarray, budget: int) -> int:
    """Batches from the least that could do, in growing strides until they do, then back by halves."""
    tokens = int(longest_first.sum()) / budget
    least = min(ceil(tokens / ROOM), max(ceil(tokens), floor(tokens / LEAST)))
    too_few, enough = max(least, int((longest_first > budget / 2).sum())) - 1, 0
    stride = 1
    while not enough:
        tried = min(too_few + stride, len(longest_first))
        if tried == len(longest_first) or _lightest(longest_first, tried, budget) is not None:
            enough = tried
        else:
            too_few, stride = tried, max(2 * stride, tried // 200)
    while enough - too_few > 1 + enough // 1000:
        tried = (enough + too_few) // 2
        if _lightest(longest_first, tried, budget) is not None:
            enough = tried
        else:
            too_few = tried
    return enough


def _lightest(lengths: np.ndarray, slots: int, budget: int) -> np.ndarray | None:
    """The slot of each conversation in the order they come, each to one of the lightest; None where one gets too heavy.

    In rounds: the slots that are no heavier than the lightest would be with the next conversation take one each, the
    lightest first.
    """
    if lengths.sum() > slots * budget:
        return None
    count, bits = len(lengths), max(1, (slots - 1).bit_length())
    found = np.empty(count, dtype=np.int64)
    loads = np.zeros(slots, dtype=np.int64)
    everyone = np.arange(slots)
    start = 0
    while start < count:
        within = loads <= loads.min() + lengths[start]
        keys = (loads[within] << bits) | everyone[within]
        keys.sort()
        takers = keys[: count - start] & ((1 << bits) - 1)
        block = slice(start, start + len(takers))
        found[block] = takers
        loads[takers] += lengths[block]
        if slots > FEW and loads[takers].max() > budget:
            return None
        start += len(takers)
    return found if (loads <= budget).all() else _levelled(lengths, found, loads, budget)


def _tightest(lengths: np.ndarray, slots: int, budget: int) -> np.ndarray | None:
    """The slot of each conversation in the order they come, each to the fullest that has room; None where one has none.

    Slots are opened one after the other. It needs fewer of them than the lightest rule where a slot has room for a few
    conversations only, but the first slots get the longest.
    """
    if len(lengths) > MANY:
        return None
    bits = max(1, (slots - 1).bit_length())
    found: list[int] = []
    rooms: list[int] = []  # (what a slot has left << bits) | its number, in order
    opened = 0
    for length in lengths.tolist():
        place = bisect_left(rooms, length << bits)
        if place < len(rooms):
            room = rooms.pop(place)
            slot, left = room & ((1 << bits) - 1), (room >> bits) - length
        elif opened < slots:
            slot, left = opened, budget - length
            opened += 1
        else:
            return None
        found.append(slot)
        if left:
            insort(rooms, left << bits | slot)
    return np.array(found, dtype=np.int64)


def _none_empty(found: np.ndarray, slots: int) -> np.ndarray:
    """The slots after each empty one got a conversation of one that holds several."""
    counts = np.bincount(found, minlength=slots)
    for empty in np.flatnonzero(counts == 0):
        giver = counts.argmax()
        found[np.flatnonzero(found == giver)[-1]] = empty
        counts[giver] -= 1
        counts[empty] = 1
    return found


def _levelled(lengths: np.ndarray, slots: np.ndarray, loads: np.ndarray, budget: int) -> np.ndarray | None:
    """The slots after exchanges between the heaviest and the lightest, until none is too heavy; None where none helps.

    Each makes their loads as equal as one conversation there for one or none back can.
    """
    while loads.max() > budget:
        heavy, light = loads.argmax(), loads.argmin()
        gap = loads[heavy] - loads[light]
        going, coming = np.flatnonzero(slots == heavy), np.flatnonzero(slots == light)
        coming = coming[np.argsort(lengths[coming], kind="stable")]
        back = np.append(0, lengths[coming])
        above = np.searchsorted(back, lengths[going] - gap // 2).clip(1, len(back) - 1)
        partners = np.stack([above - 1, above])
        moved = lengths[going] - back[partners]
        unequal = abs(gap - 2 * moved)
        side, place = np.unravel_index(unequal.argmin(), unequal.shape)
        if unequal[side, place] >= gap:
            return None
        slots[going[place]] = light
        if partner := partners[side, place]:
            slots[coming[partner - 1]] = heavy
        loads[heavy] -= moved[side, place]
        loads[light] += moved[side, place]
    return slots


def _descending(values: np.ndarray) -> np.ndarray:
    """Indices by falling value, equal ones in order: like a stable argsort, several times as fast."""
    bits = max(1, (len(values) - 1).bit_length())
    keys = (-values << bits) | np.arange(len(values))
    keys.sort()
    return keys & ((1 << bits) - 1)


def by_batch(labels: np.ndarray, batches: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices batch after batch, ``int64 [conversations]``, and where each batch starts, ``int64 [batches + 1]``."""
    bounds = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=batches))])
    return _descending(batches - labels), bounds
