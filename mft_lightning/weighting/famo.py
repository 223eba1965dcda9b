"""FAMO, fast adaptive multitask optimisation: all tasks' losses are to fall at the same relative rate.

Liu et al., https://arxiv.org/abs/2306.03792. There the losses of a batch are computed once more after the step; here
the next step's are taken, of other conversations of the same tasks, so that no forward pass is added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mft_lightning.errors import UserError
from mft_lightning.weighting.balancer import LEAST, Balancer


@dataclass(kw_only=True)
class FamoSettings:
    """The FAMO balancer (``model.weighted_loss_mode: famo``).

    Args:
        learning_rate: of the tasks' logits, which Adam moves; the paper's 0.025.
        weight_decay: pulls the logits back to equality; the paper's 0.001.
    """

    learning_rate: float = 0.025
    weight_decay: float = 0.001

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"model.famo.learning_rate: {self.learning_rate} is no number above 0.")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"model.famo.weight_decay: {self.weight_decay} is no number from 0 on.")


class Famo(Balancer):
    """``w_k`` in proportion to ``softmax(xi)_k / loss_k``; a task that falls slower than the others gains.

    A task that was absent from a step neither wins nor loses in it, and its last known loss stands. When it comes
    again, what it has fallen by is taken per step.

    Args:
        tasks: how many there are.
        settings: of the steps of ``xi``.
    """

    name = "famo"

    def __init__(self, tasks: int, settings: FamoSettings) -> None:
        super().__init__(tasks)
        self.logits = torch.zeros(tasks, dtype=torch.float64)
        self.losses = torch.full((tasks,), torch.nan, dtype=torch.float64)  # the last known
        self.ages = torch.ones(tasks, dtype=torch.float64)  # steps since then
        self._optimizer = torch.optim.Adam([self.logits], settings.learning_rate, weight_decay=settings.weight_decay)
        self._settings = settings

    def after_step(self, step: int, train: Tensor, valid: Tensor | None = None) -> None:
        now = train.clamp_min(LEAST)
        fallen = (self.losses.log() - now.log()) / self.ages
        compared = ~fallen.isnan()
        shares = torch.where(compared, self.logits.softmax(0), 0.0)
        if compared.sum() > 1:
            fallen = fallen.nan_to_num(0.0)
            # the softmax's Jacobian times `fallen`, among the tasks that are compared
            self.logits.grad = shares * (fallen - (shares * fallen).sum() / shares.sum())
            self._optimizer.step()
        self.losses = torch.where(now.isnan(), self.losses, now)
        self.ages = torch.where(now.isnan(), self.ages + 1, 1.0)
        if not self.losses.isnan().any():
            scaled = self.logits.softmax(0) / self.losses
            self.weights = scaled / scaled.mean()

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "logits": self.logits.clone(),
            "losses": self.losses,
            "ages": self.ages,
            "moments": self._optimizer.state_dict()["state"],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self.losses, self.ages = state["weights"], state["losses"], state["ages"]
        self.logits.copy_(state["logits"])
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state["moments"], "param_groups": groups})
