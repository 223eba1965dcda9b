"""Tasks are drawn at the rates that were asked for, and their conversations equally often."""

from collections import Counter
from math import isclose
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.data import sampling
from mft_lightning.data.sampling import TaskDraws, TaskSampling, parse_task_sampling
from mft_lightning.errors import UserError

NAMES = ["sums", "code", "tests"]
SEEDS = st.integers(0, 2**32 - 1)
RATES = st.floats(0.2, 5)
TASKS = st.lists(st.integers(0, 2), min_size=60, max_size=120).map(lambda values: np.array([0, 1, 2, *values]))
SAMPLINGS = st.one_of(
    st.builds(TaskSampling, temperature=st.floats(0.9, 50)),
    st.builds(TaskSampling, rates=st.fixed_dictionaries(dict.fromkeys(NAMES, RATES))),
)
checked = settings(deadline=None, max_examples=150)


def drawn_from(sampling: TaskSampling, tasks: np.ndarray, seed: int = 1) -> TaskDraws:
    draws = sampling.draws(tasks, NAMES, seed)
    assert draws is not None
    return draws


# --- the setting


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("proportional", TaskSampling()),
        ({"temperature": 2}, TaskSampling(temperature=2.0)),
        ({"code": 1, "sums": 2, "tests": 0.5}, TaskSampling(rates={"sums": 2.0, "code": 1.0, "tests": 0.5})),
        ([2, 1, 0.5], TaskSampling(rates={"sums": 2.0, "code": 1.0, "tests": 0.5})),
    ],
)
def test_a_setting_is_read_and_can_be_written_again(setting: Any, expected: TaskSampling) -> None:
    parsed = parse_task_sampling(setting, NAMES)
    assert parsed == expected
    assert parse_task_sampling(parsed.setting, NAMES) == expected


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("uniform", "'uniform' is neither proportional"),
        (2.0, "2.0 is neither proportional"),
        (None, "None is neither proportional"),
        ({"temperature": 0}, "0 is no temperature"),
        ({"temperature": -1.0}, "-1.0 is no temperature"),
        ({"temperature": float("inf")}, "inf is no temperature"),
        ({"temperature": float("nan")}, "nan is no temperature"),
        ({"temperature": True}, "True is no temperature"),
        ({"temperature": 2, "sums": 1}, "(missing: 'code', 'tests'; unknown: 'temperature')"),
        ({"temprature": 2}, "'temprature'"),
        ({"sums": 1, "code": 1}, "'tests'"),
        ({"sums": 1, "code": 1, "tests": 1, "cooking": 1}, "'cooking'"),
        ({}, "one rate for each of sums, code, tests"),
        ({"sums": 1, "code": 0, "tests": 1}, "one positive number for each of sums, code, tests"),
        ([1, -1, 1], "one positive number"),
        ([1, float("nan"), 1], "one positive number"),
        ([1, float("inf"), 1], "one positive number"),
        ([1, 1], "one positive number"),
        ([1, "2", 1], "one positive number"),
    ],
)
def test_a_setting_that_makes_no_sense_is_an_error_that_names_the_key(setting: Any, words: str) -> None:
    with pytest.raises(UserError, match=r"^data\.task_sampling: ") as caught:
        parse_task_sampling(setting, NAMES)
    assert words in str(caught.value)


def test_a_task_may_be_called_temperature() -> None:
    parsed = parse_task_sampling({"temperature": 2, "rain": 1}, ["rain", "temperature"])
    assert parsed == TaskSampling(rates={"rain": 1.0, "temperature": 2.0})


# --- rates


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"temperature": 1}, (100, 400, 900)),
        ({"temperature": 2}, (233, 467, 700)),  # as 10 : 20 : 30
        ({"temperature": 1e12}, (467, 467, 466)),
        ([1, 1, 2], (350, 350, 700)),
        ({"tests": 1, "code": 1, "sums": 5}, (1000, 200, 200)),
    ],
)
def test_an_epoch_has_as_many_draws_as_conversations_at_the_asked_rates(setting: Any, expected: tuple[int]) -> None:
    tasks = np.repeat([0, 1, 2], [100, 400, 900])
    assert drawn_from(parse_task_sampling(setting, NAMES), tasks).per_epoch == expected


def test_proportional_draws_nothing_by_task() -> None:
    assert TaskSampling().draws(np.array([0, 1, 2]), NAMES, 1) is None


@given(tasks=TASKS, sampling=SAMPLINGS)
@checked
def test_draws_are_whole_numbers_less_than_one_from_the_rate(tasks: np.ndarray, sampling: TaskSampling) -> None:
    counts = np.bincount(tasks)
    scores = (
        [count ** (1 / sampling.temperature) for count in counts.tolist()]
        if sampling.temperature
        else [(sampling.rates or {})[name] for name in NAMES]
    )
    try:
        draws = drawn_from(sampling, tasks).per_epoch
    except UserError:
        assert min(scores) / sum(scores) * len(tasks) < 1
        return
    assert sum(draws) == len(tasks)
    for drawn, score in zip(draws, scores, strict=True):
        exact = score / sum(scores) * len(tasks)
        assert abs(drawn - exact) < 1 or isclose(abs(drawn - exact), 1, abs_tol=1e-5)


@pytest.mark.parametrize("setting", [[1, 1, 1e-9], {"temperature": 1e-5}])
def test_a_rate_at_which_nothing_of_a_task_is_seen_is_an_error(setting: Any) -> None:
    tasks = np.repeat([0, 1, 2], [30, 30, 20])
    with pytest.raises(UserError, match=r"^data\.task_sampling: .* draws nothing of tests in an epoch of 80 conv"):
        parse_task_sampling(setting, NAMES).draws(tasks, NAMES, 1)


# --- draws


@given(tasks=TASKS, sampling=SAMPLINGS, seed=SEEDS, block=st.sampled_from([1, 50, 1 << 16]))
@checked
def test_at_any_epoch_all_conversations_of_a_task_were_seen_equally_often_or_once_more(
    tasks: np.ndarray, sampling: TaskSampling, seed: int, block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mft_lightning.data.sampling._BLOCK", block)
        try:
            draws = drawn_from(sampling, tasks, seed)
        except UserError:
            return
        seen: Counter[int] = Counter()
        for epoch in range(7):
            drawn = draws.drawn(epoch)
            assert tuple(np.bincount(tasks[drawn], minlength=3).tolist()) == draws.per_epoch
            seen.update(drawn.tolist())
            for task in range(3):
                times = {seen[index] for index in np.flatnonzero(tasks == task).tolist()}
                assert max(times) - min(times) <= 1


def test_every_pass_is_in_another_order_and_every_task_and_seed_too() -> None:
    tasks = np.repeat([0, 1, 2], 40)
    passes = [
        drawn_from(TaskSampling(temperature=1.0), tasks, seed).drawn(epoch) for seed in (1, 2) for epoch in (0, 1)
    ]
    orders = {tuple((part % 40).tolist()) for drawn in passes for part in np.split(drawn, 3)}
    assert len(orders) == 12


def test_an_epoch_alone_is_what_it_is_after_the_others() -> None:
    tasks = np.repeat([0, 1, 2], [3, 40, 100])
    one, other = (drawn_from(TaskSampling(temperature=3.0), tasks) for _ in range(2))
    assert [one.drawn(epoch).tolist() for epoch in range(4)][3] == other.drawn(3).tolist()


def test_a_small_task_seen_many_times_takes_few_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = TaskDraws(members=(np.arange(3),), per_epoch=(1_000_000,), seed=1)
    made = []
    real = np.random.default_rng
    monkeypatch.setattr(sampling.np.random, "default_rng", lambda seed: made.append(seed) or real(seed))
    assert np.bincount(draws.drawn(5)).max() <= 333_334 and len(made) <= 17


@given(tasks=TASKS, seed=SEEDS)
@checked
def test_typical_values_are_the_values_where_all_are_drawn_once(tasks: np.ndarray, seed: int) -> None:
    values = np.random.default_rng(seed).integers(1, 1000, len(tasks))
    draws = drawn_from(TaskSampling(temperature=1.0), tasks)
    assert sorted(draws.typical(values).tolist()) == sorted(values.tolist())


def test_typical_values_have_each_task_as_often_as_it_is_drawn_and_its_middle_values() -> None:
    draws = TaskDraws(members=(np.arange(3), np.arange(3, 103)), per_epoch=(6, 4), seed=1)
    values = np.array([7, 9, 8, *range(100)])
    assert draws.typical(values).tolist() == [7, 7, 8, 8, 9, 9, 12, 37, 62, 87]


def test_rates_of_any_size_and_names_that_yaml_reads_as_numbers() -> None:
    tasks = np.repeat([0, 1], 50)
    huge = parse_task_sampling([1e308, 1e308], ["2024", "2025"]).draws(tasks, ["2024", "2025"], 1)
    named = parse_task_sampling({2024: 1, 2025: 1}, ["2024", "2025"]).draws(tasks, ["2024", "2025"], 1)
    assert huge is not None and named is not None and huge.per_epoch == named.per_epoch == (50, 50)
