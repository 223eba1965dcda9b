"""How many draws an epoch has where tasks are drawn at rates and steps hold a budget of tokens.

Where every conversation is seen once an epoch, the last step of an epoch may be part empty. At rates an epoch may have
any number of draws, so it gets one that fills all of its steps.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from mft_lightning.data.sampling import TaskDraws
from mft_lightning.data.token_batches import ROOM, count_batches

AIMS = (0.99, ROOM)  # of the budget, that typical draws are to fill; of many steps count_batches leaves more room
ENOUGH = 0.978  # of the budget, filled by typical draws: they stay as they are
MOST = 1 / 3  # of the draws, more or fewer


def in_whole_steps(draws: TaskDraws, lengths: np.ndarray, budget: int) -> TaskDraws:
    """Draws at the same rates of which there are as many as typically fill whole steps, a third more or fewer at most.

    They stay as they are where every conversation is drawn once, where they fill enough already, and where no such
    number does: of less than a step, or of conversations that are long beside the budget.

    Args:
        draws: of each task in an epoch.
        lengths: tokens of each conversation, ``[conversations]``.
        budget: most tokens of a step.
    """
    tokens, steps = _filled(draws, lengths, budget)
    if tokens >= ENOUGH * steps or list(map(len, draws.members)) == list(draws.per_epoch):
        return draws
    total = sum(draws.per_epoch)
    for aim, aimed in product(AIMS, (steps, steps - 1)):
        resized = draws.resized(int(total * aim * aimed / tokens))
        if abs(sum(resized.per_epoch) - total) <= MOST * total:
            tokens_then, steps_then = _filled(resized, lengths, budget)
            if tokens_then >= ENOUGH * steps_then:
                return resized
    return draws


def _filled(draws: TaskDraws, lengths: np.ndarray, budget: int) -> tuple[float, int]:
    """How many budgets the tokens of a typical epoch are, and the steps that hold them."""
    typical = draws.typical(lengths).astype(np.int64, copy=False)
    return float(np.minimum(typical, budget).sum() / budget), count_batches(typical, budget)
