"""What is minimised of a supervised token: its NLL, or what three options make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mft_lightning.errors import UserError


class Slope(NamedTuple):
    """The gradient of a token's objective by its logits: ``probability * p + target * onehot + every``.

    Attributes:
        probability: factor of the model's probabilities, ``[P, 1]``.
        target: what is added at the token itself, ``[P, 1]``.
        every: what is added at every token of the vocabulary, ``[P, 1]``; None for nothing.
    """

    probability: Tensor
    target: Tensor
    every: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """``(1 - e) * (1 - p)^g * nll + e * u + z * l^2`` of a token with probability ``p = exp(-nll)``.

    ``u`` is the mean NLL of all tokens of the vocabulary in its place, ``l`` the logarithm of the sum of the
    exponentials of its logits.

    Args:
        label_smoothing: ``e``, the share of the target that is spread evenly (https://arxiv.org/abs/1512.00567).
        z_loss: ``z``, which keeps logits from drifting; PaLM took 1e-4 (https://arxiv.org/abs/2204.02311).
        focal_gamma: ``g`` of the focal loss (https://arxiv.org/abs/1708.02002): what is known already counts less.

    Raises:
        UserError: a value out of range.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    focal_gamma: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"model.label_smoothing: {self.label_smoothing} is not in [0, 1).")
        for key in ("z_loss", "focal_gamma"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise UserError(f"model.{key}: {getattr(self, key)} is no number from 0 on.")

    def of(self, nll: Tensor, mean_nll: Tensor, log_total: Tensor) -> Tensor:
        """The objective of tokens, all ``[P]``; ``mean_nll`` and ``log_total`` are not read where they do not count."""
        value = nll * _miss(nll) ** self.focal_gamma if self.focal_gamma else nll
        if self.label_smoothing:
            value = (1 - self.label_smoothing) * value + self.label_smoothing * mean_nll
        return value + self.z_loss * log_total.square() if self.z_loss else value

    def slope(self, nll: Tensor, log_total: Tensor, factors: Tensor, vocabulary: int) -> Slope:
        """The gradient of ``factors * objective``, all ``[P, 1]``."""
        on_target = factors * (1 - self.label_smoothing)
        if self.focal_gamma:
            miss = _miss(nll)
            ratio = torch.where(miss > 0, nll / miss, 1.0)  # what it tends to where a token is certain
            on_target = on_target * miss**self.focal_gamma * (1 + self.focal_gamma * (1 - miss) * ratio)
        probability, every = on_target, None
        if self.label_smoothing:
            spread = factors * self.label_smoothing
            probability, every = probability + spread, -spread / vocabulary
        if self.z_loss:
            probability = probability + factors * (2 * self.z_loss) * log_total
        return Slope(probability, -on_target, every)


def _miss(nll: Tensor) -> Tensor:
    """``1 - p`` of tokens by their NLL, to the last digits where ``p`` is near 1."""
    return -torch.expm1(-nll.clamp_min(0))
