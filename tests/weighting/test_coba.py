"""CoBa does what its paper says, and moves the weights the right way."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.errors import UserError
from mft_lightning.weighting.coba import FLAT, FLOOR, Coba, CobaSettings

NOTHING = torch.empty(0)


def coba(tasks: int = 3, **changes: float) -> Coba:
    return Coba(tasks, CobaSettings(**{"warmup_steps": 5, "history_length": 20, **changes}))


def run(balancer: Coba, curves: list[list[float]]) -> Coba:
    for step, valid in enumerate(curves, start=1):
        balancer.after_step(step, NOTHING, torch.tensor(valid, dtype=torch.float64))
    return balancer


def falling(*lengths: float, steps: int = 60) -> list[list[float]]:
    """Losses of tasks that fall to 1/e in so many steps."""
    return [[3 * math.exp(-step / length) for length in lengths] for step in range(steps)]


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def of_the_paper(curves: list[list[float]], warmup: int, history: int, tau: float) -> np.ndarray:
    """The weights after the last of the losses, formula by formula, before the floor; slopes below 0 do not diverge."""
    losses = np.array(curves) / np.array(curves[0])
    tasks, slopes = losses.shape[1], []
    for step in range(max(warmup, 2), len(losses) + 1):
        window = losses[max(0, step - history) : step]
        slopes.append([np.polyfit(np.arange(len(window)), window[:, task], 1)[0] for task in range(tasks)])
    alpha = np.array(slopes)
    alpha[np.abs(alpha) < FLAT] = 0
    relative = softmax(tasks * alpha[-1] / np.abs(alpha[-1]).sum())
    recent = alpha[-history:]
    absolute = softmax(-len(recent) * recent[-1] / np.abs(recent).sum(0))
    steepest, updates = alpha.max(1), len(alpha)
    rising = np.maximum(updates * steepest / np.abs(steepest).sum(), 0)
    factor = min(1.0, updates * softmax(-tau * rising)[-1])
    return tasks * softmax(tasks * (factor * relative + (1 - factor) * absolute))


@given(
    st.lists(st.lists(st.floats(0.5, 5), min_size=3, max_size=3), min_size=6, max_size=40),
    st.integers(2, 8),
    st.integers(3, 12),
    st.sampled_from([1.0, 5.0]),
)
@settings(deadline=None, max_examples=100)
def test_it_is_the_formulas_of_the_paper(curves: list[list[float]], warmup: int, history: int, tau: float) -> None:
    if len({tuple(one) for one in curves}) < 3 or len(curves) < warmup:
        return
    found = run(coba(warmup_steps=warmup, history_length=history, tau=tau), curves).weights.numpy()
    with np.errstate(divide="ignore", invalid="ignore"):  # where nothing moved, the paper has no weights
        expected = of_the_paper(curves, warmup, history, tau)
    if np.isfinite(expected).all() and expected.min() > FLOOR:
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_task_that_converges_slowly_gains() -> None:
    slow, middle, fast = run(coba(), falling(200, 80, 40)).weights.tolist()
    assert slow > 1.2 and slow > middle > fast


def test_a_task_that_overfits_loses() -> None:
    """It converged fastest; from where its validation loss rises again, it falls below all others, and below before."""
    curves = falling(200, 80, 40)
    before = run(coba(), curves).weights[2]
    rising = [
        [slow, middle, curves[-1][2] + 0.05 * step] for step, (slow, middle, _) in enumerate(falling(200, 80, 40))
    ]
    for task, length in ((0, 200), (1, 80)):
        for step, row in enumerate(rising):
            row[task] = 3 * math.exp(-(60 + step) / length)
    balancer = run(coba(), curves + rising)
    assert balancer.weights[2] < before and balancer.weights[2] == balancer.weights.min()
    assert balancer.divergence_factor() < 0.01


@pytest.mark.parametrize(
    "curve",
    [
        lambda step: [2.5 + 0.5 * math.exp(-step / 60), 3 - 1.25e-3 * step],
        lambda step: [0.5 + 3 * math.exp(-step / 600), 0.5 + 3 * math.exp(-step / 100)],
        lambda step: [(step + 1) ** -0.15, (step + 1) ** -0.5],
    ],
    ids=["flat and steady", "exponentials", "power laws"],
)
def test_the_one_that_converges_slower_gains_on_curves_that_flatten(curve: Callable[[int], list[float]]) -> None:
    """With the defaults, over a thousand steps; noise of validation batches included."""
    generator = np.random.default_rng(0)
    curves = [[loss + 0.002 * generator.standard_normal() for loss in curve(step)] for step in range(400)]
    balancer = run(Coba(2, CobaSettings()), curves)
    slopes = balancer.slopes[:, -1]
    assert balancer.weights[slopes.argmax()] > 1.05
    assert balancer.divergence_factor() > 0.5


def test_differences_of_scale_do_not_matter() -> None:
    curves = falling(200, 80, 40)
    scaled = [[100 * one, two, 0.01 * three] for one, two, three in curves]
    torch.testing.assert_close(run(coba(), curves).weights, run(coba(), scaled).weights)


def test_the_divergence_factor_is_1_while_all_converge_as_they_did() -> None:
    straight = [[3 - 0.01 * step, 3 - 0.02 * step, 3 - 0.03 * step] for step in range(40)]
    assert run(coba(), straight).divergence_factor() == pytest.approx(1.0)


def test_no_weight_moves_in_the_warm_up() -> None:
    balancer = run(coba(warmup_steps=30), falling(200, 80, 40, steps=29))
    assert balancer.weights.tolist() == [1.0, 1.0, 1.0]
    assert run(balancer, falling(200, 80, 40, steps=30)).weights.tolist() != [1.0, 1.0, 1.0]


def test_losses_that_do_not_move_leave_the_weights_even() -> None:
    torch.testing.assert_close(run(coba(), [[2.0, 1.0, 3.0]] * 30).weights, torch.ones(3, dtype=torch.float64))


@given(st.lists(st.lists(st.floats(0.0, 100), min_size=4, max_size=4), min_size=3, max_size=30))
@settings(deadline=None, max_examples=100)
def test_weights_are_finite_of_mean_1_and_above_the_floor(curves: list[list[float]]) -> None:
    balancer = run(coba(4, warmup_steps=0), curves)
    assert float(balancer.weights.mean()) == pytest.approx(1.0)
    assert bool((balancer.weights >= FLOOR * (1 - 1e-9)).all())
    assert 0 <= balancer.divergence_factor() <= 1 if len(balancer.steepest) else True


def test_a_loss_that_is_not_finite_is_passed_over() -> None:
    curves = falling(200, 80, 40)
    spoilt = [*curves[:30], [math.nan, 1.0, 1.0], [math.inf, 1.0, 1.0], *curves[30:]]
    torch.testing.assert_close(run(coba(), spoilt).weights, run(coba(), curves).weights)


@pytest.mark.parametrize(("interval", "due"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3])])
def test_batches_are_due_at_updates_alone(interval: int, due: list[int]) -> None:
    balancer = coba(update_interval=interval, sample_valid_num=2)
    found = {step: list(balancer.batches_due(step)) for step in range(1, 5) if balancer.batches_due(step)}
    assert found == {step: [2 * number, 2 * number + 1] for number, step in enumerate(due)}
    assert len(balancer.losses[0]) == 0
    balancer.after_step(1, NOTHING)  # none was due
    assert len(balancer.losses[0]) == 0


def test_it_goes_on_where_it_was() -> None:
    curves = falling(200, 80, 40)
    whole, first, second = run(coba(), curves), run(coba(), curves[:30]), coba()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for step, valid in enumerate(curves[30:], start=31):
        second.after_step(step, NOTHING, torch.tensor(valid, dtype=torch.float64))
    assert torch.equal(whole.weights, second.weights)


@pytest.mark.parametrize(
    ("key", "value"),
    [("warmup_steps", -1), ("history_length", 1), ("update_interval", 0), ("sample_valid_num", 0), ("tau", math.inf)],
)
def test_values_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^model\.coba\.{key}: "):
        CobaSettings(**{key: value})
