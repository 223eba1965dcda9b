"""Schedules warm up to the peak and end at the floor; biases and norms do not decay."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision.amp import _optimizer_handles_unscaling
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.model.gradients import clip_gradients
from mft_lightning.model.module import MFTModule
from mft_lightning.model.optim import (
    SCHEDULERS,
    OptimizerSettings,
    group_settings,
    learning_rate_factor,
    matrix_names,
    parameter_groups,
    put_in_force,
)
from mft_lightning.model.settings import LoraSettings

CONSTANT = ("constant", "constant_with_warmup")


@given(
    scheduler=st.sampled_from(SCHEDULERS),
    warmup=st.integers(0, 40),
    decay=st.integers(1, 200),
    floor=st.floats(0, 1),
    power=st.floats(0.5, 3),
    cycles=st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_every_schedule_rises_to_the_peak_and_ends_at_the_floor(
    scheduler: str, warmup: int, decay: int, floor: float, power: float, cycles: int
) -> None:
    total = warmup + decay
    factor = learning_rate_factor(
        scheduler, warmup_steps=warmup, total_steps=total, min_ratio=floor, power=power, num_cycles=cycles
    )
    rates = [factor(finished) for finished in range(total)]
    assert all(0 < rate <= 1 for rate in rates[:-1]) and rates[-1] <= 1
    assert rates[:warmup] == sorted(rates[:warmup])
    if warmup:
        assert rates[warmup - 1] == 1.0
    assert rates[-1] == pytest.approx(1.0 if scheduler in CONSTANT else floor)
    if scheduler != "cosine_with_restarts":
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert min(rates[warmup:]) >= floor - 1e-12


@pytest.mark.parametrize(
    ("scheduler", "reference"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_decay_is_that_of_transformers(scheduler: str, reference: object) -> None:
    """The same curve; ours is read one step later, so that the first step learns and the last is at the floor."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = reference(optimizer, 5, 30)
    ours = learning_rate_factor(scheduler, warmup_steps=5, total_steps=30)
    for finished in range(30):
        optimizer.step()
        theirs.step()
        assert ours(finished) == pytest.approx(theirs.get_last_lr()[0])


def test_restarts_return_to_the_peak() -> None:
    factor = learning_rate_factor("cosine_with_restarts", warmup_steps=0, total_steps=100, num_cycles=2)
    rates = [factor(finished) for finished in range(100)]
    assert rates[48] < 0.01 and rates[49] == 1.0 and rates[99] == 0.0


def test_log_warmup_rises_faster_than_linear() -> None:
    log = learning_rate_factor("log_warmup_linear_decay", warmup_steps=100, total_steps=200)
    linear = learning_rate_factor("linear", warmup_steps=100, total_steps=200)
    assert all(log(u) > linear(u) for u in range(99)) and log(99) == linear(99) == 1.0
    assert log(150) == linear(150)


def test_biases_and_norms_do_not_decay(tiny_model: Path, example_tasks: list[str]) -> None:
    datamodule = MFTDataModule(data_paths=example_tasks, tokenizer_path=str(tiny_model))
    network = MFTModule(pretrained_model_path=str(tiny_model), init="random").build(datamodule)
    names = {id(p): name for name, p in network.named_parameters()}
    decaying, still = parameter_groups(network.named_parameters(), matrix_names(network), 0.1)
    assert decaying["weight_decay"] == 0.1 and still["weight_decay"] == 0.0
    assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in still["params"])
    assert not any(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in decaying["params"])
    assert len(decaying["params"]) + len(still["params"]) == len(names)


@pytest.mark.parametrize("use_dora", [False, True])
def test_loraplus_learns_as_fast_as_pefts_own(tiny_model: Path, example_tasks: list[str], use_dora: bool) -> None:
    """Every parameter at the rate and decay that peft gives it; DoRA's magnitudes alone decay there, and not here."""
    datamodule = MFTDataModule(data_paths=example_tasks, tokenizer_path=str(tiny_model))
    lora = LoraSettings(r=4, use_dora=use_dora, loraplus_lr_ratio=16)
    module = MFTModule(pretrained_model_path=str(tiny_model), init="random", peft_type="lora", lora=lora)
    network = module.build(datamodule)
    names = {id(parameter): name for name, parameter in network.model.named_parameters()}
    theirs = create_loraplus_optimizer(
        network.model, torch.optim.AdamW, lr=1e-5, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    ours, scheduler = module.optim.build(network.named_parameters(), matrix_names(network), total_steps=10)

    def by_name(optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
        groups = optimizer.param_groups
        return {names[id(p)]: (g.get("initial_lr", g["lr"]), g["weight_decay"]) for g in groups for p in g["params"]}

    still = {name: (rate, 0.0) for name, (rate, _) in by_name(theirs).items() if "magnitude" in name}
    assert by_name(ours) == by_name(theirs) | still and bool(still) == use_dora
    assert {rate for rate, _ in by_name(ours).values()} == {1e-5, 16e-5}
    assert len(ours.param_groups) == (3 if use_dora else 2)
    for _ in range(5):
        ours.step()
        scheduler.step()
    rates = [group["lr"] for group in ours.param_groups]
    assert rates[1] == pytest.approx(16 * rates[0]) and 0 < rates[0] < 1e-5


def adamw(parameters: Iterable[tuple[str, nn.Parameter]], *, scaled: bool = False) -> tuple[AdamW, LambdaLR]:
    settings = OptimizerSettings(
        kind="adamw",
        learning_rate=1e-2,
        min_lr=0,
        num_warmup_steps=0,
        lr_scheduler_type="constant",
        lr_power=1.0,
        lr_num_cycles=1,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
    )
    optimizer, scheduler = settings.build(parameters, {"weight"}, 10, scaled=scaled)
    assert isinstance(optimizer, AdamW)
    return optimizer, scheduler


@pytest.mark.parametrize("overflow", [True, False])
def test_scaled_gradients_are_measured_as_they_are(overflow: bool) -> None:
    """In the order of Lightning's MixedPrecision: it leaves the scale to optimizers that would undo it themselves."""
    network = nn.Linear(8, 8)
    loss = network(torch.ones(2, 8)).square().mean()
    expected = torch.cat([one.flatten() for one in torch.autograd.grad(loss, list(network.parameters()))]).norm()
    optimizer, _ = adamw(network.named_parameters(), scaled=True)
    assert not _optimizer_handles_unscaling(optimizer)
    before = network.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(network(torch.ones(2, 8)).square().mean()).backward()
    if overflow:
        assert network.weight.grad is not None
        network.weight.grad[0, 0] = torch.inf
    scaler.unscale_(optimizer)
    norm = clip_gradients(network, list(network.parameters()), 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(network.weight, before) is overflow
    assert norm == (torch.inf if overflow else pytest.approx(float(expected), rel=1e-5))


def test_steps_are_counted_where_weights_are() -> None:
    """Of a checkpoint whose optimizer was not fused, they came on the host."""
    weight = nn.Parameter(torch.zeros(3, 2, device="meta"))
    optimizer, scheduler = adamw([("weight", weight)])
    optimizer.state[weight] = {"step": torch.tensor(4.0), "exp_avg": torch.zeros_like(weight)}
    put_in_force(group_settings(optimizer), optimizer, scheduler)
    assert optimizer.state[weight]["step"].device == weight.device
