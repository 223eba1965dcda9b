"""Draws at rates, a few more or fewer of them than asked, so that steps of a token budget are full.

Where every conversation is seen once an epoch, the last step of an epoch may be part empty. At rates an epoch may have
any number of draws, so it has one that ends with a full step.
"""

from __future__ import annotations

import numpy as np

from mft_lightning.data.sampling import TaskDraws
from mft_lightning.data.token_batches import ROOM, count_batches

ENOUGH = 0.975  # of the budget, filled by typical draws: they stay as they are
MOST = 1 / 8  # of the draws, more or fewer


def in_whole_steps(draws: TaskDraws, lengths: np.ndarray, budget: int) -> TaskDraws:
    """The draws with the same rates and a total, at most an eighth off, that typically fills whole steps to 98%.

    They stay as they are where they fill enough already, and where no such total does: of few steps, or of
    conversations that are long beside the budget.

    Args:
        draws: of each task in an epoch.
        lengths: tokens of each conversation, ``[conversations]``.
        budget: most tokens of a step.
    """
    tokens, steps = _filled(draws, lengths, budget)
    if tokens >= ENOUGH * steps:
        return draws
    total = sum(draws.per_epoch)
    for aimed in sorted((steps - 1, steps), key=lambda number: abs(ROOM * number - tokens)):
        resized = draws.resized(int(total * ROOM * aimed / tokens))
        if abs(sum(resized.per_epoch) - total) <= MOST * total:
            tokens_then, steps_then = _filled(resized, lengths, budget)
            if tokens_then >= ENOUGH * steps_then:
                return resized
    return draws


def _filled(draws: TaskDraws, lengths: np.ndarray, budget: int) -> tuple[float, int]:
    """How many budgets the tokens of a typical epoch are, and the steps that hold them."""
    typical = draws.typical(lengths).astype(np.int64, copy=False)
    return float(np.minimum(typical, budget).sum() / budget), count_batches(typical, budget)
