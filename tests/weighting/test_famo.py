"""FAMO does what its paper says, and moves the weights the right way."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mft_lightning.errors import UserError
from mft_lightning.weighting.famo import Famo, FamoSettings


def losses(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def famo(tasks: int = 2, **changes: float) -> Famo:
    return Famo(tasks, FamoSettings(**changes))


@given(st.lists(st.lists(st.floats(0.01, 50), min_size=3, max_size=3), min_size=2, max_size=20))
@settings(deadline=None, max_examples=50)
def test_it_is_the_algorithm_of_the_paper(steps: list[list[float]]) -> None:
    """The gradient of ``xi`` is taken by torch through the softmax, as in the paper's own program."""
    ours, logits = famo(3), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.025, weight_decay=0.001)
    for number, now in enumerate(steps):
        if number:
            fallen = losses(*steps[number - 1]).log() - losses(*now).log()
            (logits.grad,) = torch.autograd.grad(logits.softmax(0), logits, grad_outputs=fallen)
            adam.step()
        ours.after_step(number + 1, losses(*now))
        shares = logits.detach().softmax(0)
        normalised = (shares / losses(*now)) / (shares / losses(*now)).sum()
        torch.testing.assert_close(ours.weights, 3 * normalised, rtol=1e-9, atol=1e-12)


def test_differences_of_scale_are_evened_out() -> None:
    """Two parameters, one with a loss a hundred times the other's: their losses fall at the same relative rate."""
    scale, rate = losses(100.0, 1.0), 2e-3
    fallen = {}
    for balanced in (True, False):
        place, balancer = losses(1.0, 1.0), famo()
        for step in range(1, 301):
            now = scale * place**2
            balancer.after_step(step, now)
            weights = balancer.weights if balanced else torch.ones(2, dtype=torch.float64)
            place -= rate * weights * scale * 2 * place
        fallen[balanced] = (scale.log() - (scale * place**2).log()).tolist()
        if balanced:
            assert balancer.weights[1] / balancer.weights[0] > 50
    assert fallen[True][0] == pytest.approx(fallen[True][1], rel=0.1)
    assert fallen[False][0] > 50 * fallen[False][1]


def test_a_task_that_falls_slower_than_the_others_gains() -> None:
    balancer, now = famo(3), losses(2.0, 2.0, 2.0)
    for step in range(1, 200):
        balancer.after_step(step, now)
        now = now * losses(0.999, 0.99, 0.98)
    slow, middle, fast = (balancer.logits.softmax(0) * 3).tolist()
    assert slow > 1.2 > middle > fast


def test_tasks_that_fall_alike_stay_alike() -> None:
    balancer, now = famo(), losses(2.0, 2.0)
    for step in range(1, 50):
        balancer.after_step(step, now)
        now = now * 0.99
    assert balancer.weights.tolist() == [1.0, 1.0]


def test_an_absent_task_keeps_its_last_loss() -> None:
    balancer = famo()
    balancer.after_step(1, losses(math.nan, 2.0))
    assert balancer.weights.tolist() == [1.0, 1.0]  # nothing is known of one yet
    balancer.after_step(2, losses(4.0, 2.0))
    before = balancer.logits.clone()
    balancer.after_step(3, losses(math.nan, 2.0))
    assert balancer.losses.tolist() == [4.0, 2.0] and torch.equal(balancer.logits, before)
    assert balancer.weights[1] == 2 * balancer.weights[0]


def test_a_task_that_comes_seldom_but_falls_alike_stays_alike() -> None:
    balancer, now = famo(weight_decay=0.0), 2.0
    for step in range(1, 200):
        balancer.after_step(step, losses(now, now if step % 10 == 1 else math.nan))
        now *= 0.99
        torch.testing.assert_close(balancer.logits, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_loss_of_nothing_leaves_finite_weights() -> None:
    balancer = famo()
    for step, first in enumerate((1.0, 0.0, 0.0), start=1):
        balancer.after_step(step, losses(first, 1.0))
    assert balancer.weights.isfinite().all() and float(balancer.weights.mean()) == pytest.approx(1.0)


def test_it_goes_on_where_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(12, 3, generator=generator, dtype=torch.float64) + 0.1
    whole, first, second = famo(3), famo(3), famo(3)
    for number, now in enumerate(steps, start=1):
        whole.after_step(number, now)
        if number <= 5:
            first.after_step(number, now)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(first.weights, second.weights)
    for number, now in enumerate(steps[5:], start=6):
        second.after_step(number, now)
    assert torch.equal(whole.weights, second.weights)


@pytest.mark.parametrize(("key", "value"), [("learning_rate", 0.0), ("weight_decay", -1.0), ("weight_decay", math.nan)])
def test_values_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^model\.famo\.{key}: "):
        FamoSettings(**{key: value})
