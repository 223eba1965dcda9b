"""From ``model.weighted_loss_mode`` to what weighs conversations and tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from mft_lightning.errors import UserError, first_line
from mft_lightning.weighting.balancer import Balancer, FixedWeights
from mft_lightning.weighting.coba import Coba, CobaSettings
from mft_lightning.weighting.famo import Famo, FamoSettings
from mft_lightning.weighting.static import StaticMode

WeightingMode = Literal["case1", "case2", "case3", "case4", "coba", "famo"]
OwnBalancer = Callable[[int], Balancer]  # a user's, of so many tasks
MEANING = {  # in a few words
    "case1": "tokens count alike",
    "case2": "conversations count alike",
    "case3": "tasks count alike, and tokens within a task",
    "case4": "tasks count alike, and conversations within a task",
}
TASK_WEIGHTED_MODES = ("case3", "case4")  # those that take weights


def make_balancer(
    mode: WeightingMode | OwnBalancer, weights: Sequence[float], coba: CobaSettings, famo: FamoSettings
) -> Balancer:
    """What owns the tasks' weights.

    Args:
        mode: of the run.
        weights: that were asked for, or ones; of mean 1.
        coba: settings of CoBa.
        famo: settings of FAMO.
    """
    if not isinstance(mode, str):
        return _own(mode, len(weights))
    if mode == "coba":
        return Coba(len(weights), coba)
    if mode == "famo":
        return Famo(len(weights), famo)
    return FixedWeights(weights)


def _own(make: OwnBalancer, tasks: int) -> Balancer:
    key = "model.weighted_loss_mode"
    try:
        balancer = make(tasks)
    except Exception as error:  # of a class of the user's, which may raise any
        raise UserError(f"{key}: cannot be made of {tasks} task(s) ({first_line(error)}).") from error
    if not isinstance(balancer, Balancer):
        raise UserError(f"{key}: {make} makes no mft_lightning.Balancer.")
    if getattr(balancer, "tasks", None) != tasks:
        name = type(balancer).__name__
        raise UserError(f"{key}: {name} has to call super().__init__(tasks) with the {tasks} task(s) it is given.")
    balancer.name = balancer.name or f"{type(balancer).__module__}.{type(balancer).__qualname__}"
    balancer.check_weights()
    return balancer


def static_mode(mode: WeightingMode | OwnBalancer) -> StaticMode:
    """How conversations count beside the tasks' weights: balancers move those of case3."""
    return mode if mode in ("case1", "case2", "case4") else "case3"


def check_settings(mode: WeightingMode | OwnBalancer, coba: CobaSettings, famo: FamoSettings) -> None:
    """Refuse settings that would have no effect.

    Raises:
        UserError: settings of a balancer that is not the run's.
    """
    for other, is_set in (("coba", coba != CobaSettings()), ("famo", famo != FamoSettings())):
        if is_set and mode != other:
            raise UserError(f"model.{other}: is set, but model.weighted_loss_mode is {named(mode)}.")


def named(mode: WeightingMode | OwnBalancer) -> str:
    """The mode as messages name it."""
    return mode if isinstance(mode, str) else "a class of your own"
