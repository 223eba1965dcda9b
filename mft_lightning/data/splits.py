"""The split of each task into training, validation and test conversations."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from mft_lightning.errors import UserError

SPLITS = ("train", "valid", "test")
DEFAULT_SPLIT = "95,5,0"


def parse_shares(data_split: str | Sequence[float]) -> tuple[float, float, float]:
    """``"95,5,0"`` or ``[95, 5, 0]`` as shares of train, valid and test that sum to 1.

    Raises:
        UserError: not three numbers, a negative one, or nothing to train on.
    """
    try:
        shares = [float(part) for part in (data_split.split(",") if isinstance(data_split, str) else data_split)]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares) < 0 or not np.isfinite(sum(shares)) or shares[0] == 0:
        raise UserError(
            f"data.data_split: {data_split!r} is not three percentages of train, valid and test with something to "
            "train on, like '95,5,0'."
        )
    total = sum(shares)
    return shares[0] / total, shares[1] / total, shares[2] / total


def find_shares(data_split: str | Sequence[float] | None, *, separate: bool) -> tuple[float, float, float]:
    """The shares of train, valid and test: as given, or what is left to ``None``.

    Args:
        data_split: as ``parse_shares`` takes it.
        separate: whether there are validation directories, which leave validation no share.

    Raises:
        UserError: of ``parse_shares``, or a share of validation beside its directories.
    """
    if data_split is None:
        return parse_shares("100,0,0" if separate else DEFAULT_SPLIT)
    shares = parse_shares(data_split)
    if separate and shares[1]:
        raise UserError(
            f"data.data_split: {data_split!r} gives validation a share, and data.valid_data_paths directories of its "
            "own. Make the share 0, as in '95,0,5', or leave data.data_split out (null) to train on all."
        )
    return shares


def split_records(count: int, shares: Sequence[float], seed: int, task: str) -> np.ndarray:
    """Which split each of a task's ``count`` records belongs to: ``int8 [count]``, indices into ``SPLITS``.

    The records are shuffled by ``seed`` and the task's name, so that one task's split depends on no other task and
    not on lengths. Every split with a share gets at least one record where there are enough for all of them.
    """
    bounds = np.floor(np.cumsum(shares) * count + 0.5).astype(int)
    sizes = np.diff(bounds, prepend=0)
    wanted = np.asarray(shares) > 0
    if count >= wanted.sum():
        for split in np.flatnonzero(wanted & (sizes == 0)):
            sizes[sizes.argmax()] -= 1
            sizes[split] += 1
    order = np.random.default_rng([seed, zlib.crc32(task.encode())]).permutation(count)
    codes = np.empty(count, dtype=np.int8)
    codes[order] = np.repeat(np.arange(len(SPLITS), dtype=np.int8), sizes)
    return codes


def nothing_to_evaluate(
    split: str, tasks: Sequence[str], shares: Sequence[float], *, separate: bool, others: bool, in_training: bool
) -> UserError:
    """What a user reads where tasks have nothing in a split, with the ways on.

    Args:
        split: ``valid`` or ``test``.
        tasks: the tasks.
        shares: of the splits.
        separate: whether there are validation directories.
        others: whether there are tasks that have something.
        in_training: whether it is a run that wants to validate, and could do without.
    """
    key, ways = "data.data_split", [f"Train with a larger share for {split}"]
    if split == "valid" and separate:
        key, ways = "data.valid_data_paths", ["Give a directory with conversations"]
    elif shares[SPLITS.index(split)] == 0:
        example = "95,5,0" if split == "valid" else "95,0,5" if separate else "90,5,5"
        ways = [f"Train with a share for {split}, like '{example}'"]
    if split == "valid" and not separate:
        ways.append("give data.valid_data_paths")
    if others:
        ways.append("name the task in evaluation.exclude_tasks")
    if in_training:
        ways.append("set evaluation.strategy: none to train without validations")
    return UserError(
        f"{key}: no conversation to evaluate ({split}) is left of {', '.join(tasks)}. {', or '.join(ways)}."
    )
