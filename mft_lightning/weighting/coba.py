"""CoBa, the convergence balancer: all tasks' validation losses are to converge at an even pace.

Gong et al., https://arxiv.org/abs/2410.06741, with the final softmax and floor of their code. Guarded are slopes that
are all zero and a divergence factor above 1. And that factor looks at slopes above zero only: by the formula as it is
printed, a curve that flattens looks like one that rises, and the task that converges slowest loses for good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mft_lightning.errors import UserError
from mft_lightning.weighting.balancer import LEAST, Balancer

FLAT = 1e-12  # a slope of no more is rounding, which shares would blow up
FLOOR = 0.1  # of the mean weight, which no task falls below


@dataclass(kw_only=True)
class CobaSettings:
    """The CoBa balancer (``model.weighted_loss_mode: coba``).

    Args:
        warmup_steps: optimizer steps of equal weights.
        history_length: validation losses that a slope is fitted to, and slopes that one is compared with.
        tau: how sharply a loss that rises is answered.
        update_interval: optimizer steps between updates.
        sample_valid_num: validation batches per update.
        conversations_per_task: of each task in a validation batch, over all devices.
    """

    warmup_steps: int = 100
    history_length: int = 200
    tau: float = 5.0
    update_interval: int = 1
    sample_valid_num: int = 1
    conversations_per_task: int = 4

    def __post_init__(self) -> None:
        least = {"warmup_steps": 0, "history_length": 2, "update_interval": 1, "sample_valid_num": 1}
        for key, value in (least | {"conversations_per_task": 1}).items():
            if getattr(self, key) < value:
                raise UserError(f"model.coba.{key}: {getattr(self, key)} is less than {value}.")
        if not 0 < self.tau < math.inf:
            raise UserError(f"model.coba.tau: {self.tau} is no number above 0.")


class Coba(Balancer):
    """Weights from the slopes of the validation losses, each as a share of its first value.

    While all tasks converge, those that do it slowest gain (the relative convergence score); once one diverges, those
    that converge less than they used to lose (the absolute one). The divergence factor goes from the one to the other.

    Args:
        tasks: how many there are.
        settings: how long it looks back, and when.
    """

    name = "coba"
    validates = True

    def __init__(self, tasks: int, settings: CobaSettings) -> None:
        super().__init__(tasks)
        self.settings = settings
        self.conversations_per_task = settings.conversations_per_task
        nothing = torch.empty(tasks, 0, dtype=torch.float64)
        self.first = nothing
        self.losses, self.slopes = nothing, nothing  # ``[K, at most history_length]``, the latest last
        self.steepest = nothing[0]  # the largest slope of any task, of every update since the warm-up, ``[updates]``

    def batches_due(self, step: int) -> range:
        updates, rest = divmod(step, self.settings.update_interval)
        count = self.settings.sample_valid_num
        return range(0) if rest else range((updates - 1) * count, updates * count)

    def after_step(self, step: int, train: Tensor, valid: Tensor | None = None) -> None:
        if valid is None or not valid.isfinite().all():
            return
        if not self.first.numel():
            self.first = valid[:, None].clamp_min(LEAST)
        kept = self.settings.history_length
        self.losses = torch.cat([self.losses, valid[:, None] / self.first], dim=1)[:, -kept:]
        if step < self.settings.warmup_steps or self.losses.shape[1] < 2:
            return
        slope = _slopes(self.losses)
        self.slopes = torch.cat([self.slopes, slope[:, None]], dim=1)[:, -kept:]
        self.steepest = torch.cat([self.steepest, slope.max()[None]])
        tasks, factor = len(slope), self.divergence_factor()
        relative = _share(slope, tasks).softmax(0)
        absolute = -_share(self.slopes, self.slopes.shape[1])[:, -1]
        mixed = factor * relative + (1 - factor) * absolute.softmax(0)
        self.weights = tasks * _at_least((tasks * mixed).softmax(0), FLOOR / tasks)

    def divergence_factor(self) -> float:
        """From 1, while no loss rises, down to 0, where one rises as fast as the slowest of them used to fall."""
        updates = len(self.steepest)
        rising = _share(self.steepest, updates).clamp_min(0)
        return min(1.0, updates * float((-self.settings.tau * rising).softmax(0)[-1]))

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("weights", "first", "losses", "slopes", "steepest")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])


def _slopes(losses: Tensor) -> Tensor:
    """Of the straight lines of least squares through each row of ``[K, n]``, a place apart: ``[K]``."""
    places = torch.arange(losses.shape[1], dtype=losses.dtype)
    places -= places.mean()
    slopes = (losses - losses.mean(1, keepdim=True)) @ places / places.square().sum()
    return torch.where(slopes.abs() > FLAT, slopes, 0.0)


def _share(values: Tensor, count: int) -> Tensor:
    """``count`` times each value's share of the sum of absolute values in its row; zeros where all are zero."""
    total = values.abs().sum(-1, keepdim=True)
    return count * values / torch.where(total > 0, total, 1.0)


def _at_least(shares: Tensor, least: float) -> Tensor:
    """Shares of 1 with what is below ``least`` raised to it, at the cost of the others in proportion."""
    raised = torch.zeros_like(shares, dtype=torch.bool)
    while (low := (shares < least) & ~raised).any():
        raised |= low
        others = torch.where(raised, 0.0, shares)
        shares = torch.where(raised, least, others / others.sum() * (1 - least * raised.sum()))
    return shares
