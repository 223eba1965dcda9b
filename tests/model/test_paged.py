"""The paged AdamW takes AdamW's steps, and each goes on from the other's state.

Without a GPU bitsandbytes keeps plain tensors; pages themselves were not tried.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch.optim import AdamW, Optimizer

from mft_lightning.model.paged import PagedAdamW

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
RATES = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def started(kind: Any) -> tuple[list[torch.nn.Parameter], Optimizer]:
    generator = torch.Generator().manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in ((7, 5), (3,))]
    groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]
    return parameters, kind(groups, **RATES)


def stepped(parameters: list[torch.nn.Parameter], optimizer: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def saved(optimizer: Optimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("after", [AdamW, PagedAdamW])
@pytest.mark.parametrize("before", [AdamW, PagedAdamW])
def test_either_goes_on_from_the_other(before: Any, after: Any) -> None:
    expected, whole = started(AdamW)
    stepped(expected, whole, 0, 20)
    parameters, optimizer = started(before)
    stepped(parameters, optimizer, 0, 8)
    state = saved(optimizer)
    assert [set(values) for values in state["state"].values()] == [{"step", "exp_avg", "exp_avg_sq"}] * 2
    again, optimizer = started(after)
    optimizer.load_state_dict(state)
    with torch.no_grad():
        for ours, theirs in zip(again, parameters, strict=True):
            ours.copy_(theirs)
    stepped(again, optimizer, 8, 20)
    for ours, theirs in zip(again, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_its_resume_is_exact() -> None:
    expected, whole = started(PagedAdamW)
    stepped(expected, whole, 0, 20)
    parameters, optimizer = started(PagedAdamW)
    stepped(parameters, optimizer, 0, 8)
    state = saved(optimizer)
    optimizer = started(PagedAdamW)[1]
    for group, mine in zip(optimizer.param_groups, ([parameters[0]], [parameters[1]]), strict=True):
        group["params"] = mine
    optimizer.load_state_dict(state)
    stepped(parameters, optimizer, 8, 20)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parameters, expected, strict=True))
