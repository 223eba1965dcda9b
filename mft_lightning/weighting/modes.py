"""From ``model.weighted_loss_mode`` to what weighs conversations and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mft_lightning.errors import UserError
from mft_lightning.weighting.balancer import Balancer, FixedWeights
from mft_lightning.weighting.coba import Coba, CobaSettings
from mft_lightning.weighting.famo import Famo, FamoSettings

WeightingMode = Literal["case1", "case2", "case3", "case4", "coba", "famo"]
TASK_WEIGHTED_MODES = ("case3", "case4")  # those that take weights


def make_balancer(mode: WeightingMode, weights: Sequence[float], coba: CobaSettings, famo: FamoSettings) -> Balancer:
    """What owns the tasks' weights.

    Args:
        mode: of the run.
        weights: that were asked for, or ones; of mean 1.
        coba: settings of CoBa.
        famo: settings of FAMO.
    """
    if mode == "coba":
        return Coba(len(weights), coba)
    if mode == "famo":
        return Famo(len(weights), famo)
    return FixedWeights(weights)


def check_settings(mode: WeightingMode, coba: CobaSettings, famo: FamoSettings) -> None:
    """Refuse settings that would have no effect.

    Raises:
        UserError: settings of a balancer that is not the run's.
    """
    for other, is_set in (("coba", coba != CobaSettings()), ("famo", famo != FamoSettings())):
        if is_set and mode != other:
            raise UserError(f"model.{other}: is set, but model.weighted_loss_mode is {mode}.")
