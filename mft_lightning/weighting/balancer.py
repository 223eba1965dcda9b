"""What moves the tasks' weights between steps: one small interface, and the one that does not move them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mft_lightning.errors import UserError

LEAST = 1e-8  # NLL per token, below which a task is as good as learnt: what losses are divided by at least


class Balancer(ABC):
    """Owns the weights ``w_k`` of case3 and case4.

    It is told sums over all ranks and computes in float64 on the CPU, so its weights are the same on every rank.

    Args:
        tasks: how many there are.

    Attributes:
        weights: of the next step, of mean 1, ``float64 [K]``.
        name: of the way of balancing, which a checkpoint goes on with; the class's path where it is left empty.
        learns: whether the weights move.
        validates: whether it looks at validation losses, so that every task needs held-out conversations.
        conversations_per_task: of each task in a validation batch, over all devices.
    """

    name = ""
    learns = True
    validates = False
    conversations_per_task = 4

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks
        self.weights = torch.ones(tasks, dtype=torch.float64)

    def batches_due(self, step: int) -> range:
        """The validation batches it wants to see after an optimizer step (from 1), by their numbers (from 0).

        Batches have an order that gives each held-out conversation its turn, without an end.
        """
        return range(0)

    @abstractmethod
    def after_step(self, step: int, train: Tensor, valid: Tensor | None = None) -> None:
        """Move the weights, after a step that was not skipped.

        Args:
            step: optimizer steps taken (from 1).
            train: NLL per supervised token of each task in the step, ``float64 [K]``; NaN where a task was absent.
            valid: that in the validation batches that were due; None where none was.
        """

    def check_weights(self) -> None:
        """Raise where the weights are not what the loss needs: one from 0 on for each task, of mean 1.

        Raises:
            UserError: naming the balancer, its weights, and what is wrong with them.
        """
        weights = self.weights
        if not isinstance(weights, Tensor) or weights.dtype != torch.float64 or weights.shape != (self.tasks,):
            wrong = f"no float64 tensor of {self.tasks} elements on the CPU"
        elif not (weights.isfinite().all() and weights.min() >= 0):
            wrong = "no finite numbers from 0 on"
        elif abs(weights.mean().item() - 1) > 1e-6:
            wrong = "not of mean 1 (divide them by their mean)"
        else:
            return
        raise UserError(f"model.weighted_loss_mode: the weights of {self.name}, {weights!r}, are {wrong}.")

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that decides the next weights, in what ``torch.load`` takes with ``weights_only``."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""


class FixedWeights(Balancer):
    """The weights that were asked for.

    Args:
        weights: of mean 1.
    """

    name = "fixed"
    learns = False

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__(len(weights))
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def after_step(self, step: int, train: Tensor, valid: Tensor | None = None) -> None:
        """Nothing moves."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: they are in the configuration."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: they are in the configuration."""
