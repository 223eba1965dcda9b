"""Shares of the splits, and which conversation is in which."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.data.splits import SPLITS, parse_shares, split_records
from mft_lightning.errors import UserError

# --- shares


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("95,5,0", (0.95, 0.05, 0)),
        ("100,0,0", (1, 0, 0)),
        (" 8 , 1 , 1 ", (0.8, 0.1, 0.1)),
        ("0.5,0.25,0.25", (0.5, 0.25, 0.25)),
        ([90, 10, 0], (0.9, 0.1, 0)),
        ([0.8, 0.1, 0.1], (0.8, 0.1, 0.1)),
    ],
)
def test_shares_are_normalised(text: str | list[float], expected: tuple[float, ...]) -> None:
    assert parse_shares(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "95,5",
        "95,5,0,0",
        "a,b,c",
        "95;5;0",
        "95,5,",
        "-5,100,5",
        "0,50,50",
        "0,0,0",
        "nan,5,0",
        "inf,5,0",
        [],
        [95, 5],
        [0, 1, 0],
    ],
)
def test_shares_that_are_not_three_percentages_are_an_error(bad: str | list[float]) -> None:
    with pytest.raises(UserError, match=r"^data\.data_split: .*95,5,0"):
        parse_shares(bad)


# --- splits


SHARES = st.tuples(st.integers(1, 100), st.integers(0, 100), st.integers(0, 100)).map(
    lambda parts: parse_shares(",".join(map(str, parts)))
)
COUNTS, SEEDS = st.integers(0, 400), st.integers(0, 2**32 - 1)
checked = settings(deadline=None, max_examples=200)


def sizes_of(codes: np.ndarray) -> list[int]:
    return [int((codes == split).sum()) for split in range(len(SPLITS))]


@given(count=COUNTS, shares=SHARES, seed=SEEDS)
@checked
def test_every_record_is_in_one_split_that_has_a_share(count: int, shares: tuple[float, ...], seed: int) -> None:
    codes = split_records(count, shares, seed, "math")
    assert codes.shape == (count,)
    assert all(shares[code] > 0 for code in codes)


@given(count=COUNTS, shares=SHARES, seed=SEEDS)
@checked
def test_every_wanted_split_gets_a_record_where_there_are_enough(
    count: int, shares: tuple[float, ...], seed: int
) -> None:
    wanted = sum(share > 0 for share in shares)
    sizes = sizes_of(split_records(count, shares, seed, "math"))
    filled = sum(size > 0 for size in sizes)
    assert filled == wanted if count >= wanted else filled <= count


@given(count=COUNTS, shares=SHARES, seed=SEEDS)
@checked
def test_sizes_are_within_one_record_of_the_shares(count: int, shares: tuple[float, ...], seed: int) -> None:
    sizes = sizes_of(split_records(count, shares, seed, "math"))
    exact = [share * count for share in shares]
    given_away = sum(0 < share * count < 1 for share in shares)  # the largest pays for those that round to nothing
    for size, wish in zip(sizes, exact, strict=True):
        slack = given_away if wish == max(exact) else 0
        assert wish - 1 - slack - 1e-9 <= size <= wish + 1 + 1e-9


@pytest.mark.parametrize(
    ("count", "text", "sizes"),
    [
        (100, "95,5,0", [95, 5, 0]),
        (20, "95,5,0", [19, 1, 0]),
        (3, "98,1,1", [1, 1, 1]),
        (2, "98,2,0", [1, 1, 0]),
        (1, "95,5,0", [1, 0, 0]),
        (0, "95,5,0", [0, 0, 0]),
        (7, "100,0,0", [7, 0, 0]),
        (10, "50,0,50", [5, 0, 5]),
    ],
)
def test_sizes_worked_by_hand(count: int, text: str, sizes: list[int]) -> None:
    assert sizes_of(split_records(count, parse_shares(text), 42, "math")) == sizes


@given(count=COUNTS, shares=SHARES, seed=SEEDS)
@settings(deadline=None, max_examples=50)
def test_the_same_seed_and_task_give_the_same_split(count: int, shares: tuple[float, ...], seed: int) -> None:
    first, again = (split_records(count, shares, seed, "math") for _ in range(2))
    assert (first == again).all()


def test_another_seed_or_task_gives_another_split_of_the_same_sizes() -> None:
    shares = parse_shares("50,30,20")
    base, other_seed, other_task = (
        split_records(200, shares, seed, task) for seed, task in [(1, "math"), (2, "math"), (1, "code")]
    )
    assert (base != other_seed).any() and (base != other_task).any() and (other_seed != other_task).any()
    assert sizes_of(base) == sizes_of(other_seed) == sizes_of(other_task) == [100, 60, 40]


def test_records_are_shuffled_before_the_split() -> None:
    codes = split_records(1000, parse_shares("50,50,0"), 42, "math")
    assert 150 < (codes[:500] == 0).sum() < 350
