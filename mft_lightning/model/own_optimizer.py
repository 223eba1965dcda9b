"""An optimizer of the user's: any of torch's form, under this program's parameter groups and learning rate."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mft_lightning.errors import UserError, first_line

KEY = "model.optimizer"
OwnOptimizer = Callable[[Sequence[dict[str, Any]], float], Optimizer]  # groups of parameters and their rate to it


def check_own_optimizer(make: OwnOptimizer, weight_decay: float) -> str:
    """The class path of what ``make`` makes, tried out on one matrix.

    Raises:
        UserError: it makes none, one to which ``model.weight_decay`` means nothing, or one that asks for no gradients.
    """
    made = build_own_optimizer(make, [{"params": [nn.Parameter(torch.zeros(2, 2))]}], 1e-3)
    name = f"{type(made).__module__}.{type(made).__qualname__}"
    given = made.defaults.get("weight_decay")
    if given is None and weight_decay:
        raise UserError(f"model.weight_decay: {weight_decay} means nothing to {name}, which has none. Set it to 0.")
    usual = inspect.signature(type(made).__init__).parameters.get("weight_decay")
    if usual is not None and given != usual.default:
        raise UserError(f"{KEY}: the weight_decay of {name} has no effect here. Use model.weight_decay.")
    _check_step(made, name)
    return name


class _Asked(Exception):
    """The optimizer asks for gradients."""


def _check_step(optimizer: Optimizer, name: str) -> None:
    """Let it begin a step, up to where it asks for gradients; Lightning computes them in a closure.

    Raises:
        UserError: it asks for none.
    """
    asked = False

    def closure() -> float:
        nonlocal asked
        asked = True
        raise _Asked

    why = "it does not call it"
    try:
        optimizer.step(closure=closure)
    except Exception as error:  # of a class of the user's, which may raise any
        why = first_line(error)
    if not asked:
        raise UserError(
            f"{KEY}: a step of {name} is asked for with a closure that computes the gradients, and fails ({why}). Let "
            "its step(closure) begin with loss = closure()."
        )


def build_own_optimizer(make: OwnOptimizer, groups: Sequence[dict[str, Any]], rate: float) -> Optimizer:
    """The optimizer of ``groups``, each with its own ``weight_decay`` and perhaps its own ``lr``.

    Raises:
        UserError: it cannot be made of them, with its own reason.
    """
    try:
        made = make(groups, rate)
    except Exception as error:  # of a class of the user's, which may raise any
        raise UserError(f"{KEY}: cannot be made of these parameters ({first_line(error)}).") from error
    if not isinstance(made, Optimizer):
        raise UserError(f"{KEY}: {type(made).__name__} is no torch.optim.Optimizer.")
    return made
