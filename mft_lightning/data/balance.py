"""How evenly a plan deals tokens: the micro-batches of a step against their mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mft_lightning.data.plan import Plan

DEFAULT_STEPS = 300


@dataclass(frozen=True, eq=False, kw_only=True)
class Balance:
    """Tokens that the micro-batches of an epoch's first steps compute; all arrays are ``[steps]``.

    A packed micro-batch computes the tokens of its conversations; a padded one its rows times the longest of them.

    Attributes:
        lightest: fewest tokens of a micro-batch, ``int64``; 0 where one has no conversation.
        mean: tokens of a micro-batch on average, ``float64``.
        heaviest: most tokens of a micro-batch, ``int64``.
        useful: share of the computed tokens that is no padding, ``float64``.
        micros: micro-batches of the step over all ranks, ``int64``.
        idle: those of them without a conversation, ``int64``.
        short: whether it is the epoch's last batch and holds fewer conversations than any other, ``bool``.
        steps_per_epoch: steps of the whole epoch.
        world: ranks.
        packed: whether micro-batches are packed rows. Padded ones hold like lengths, so they differ by intention.
    """

    lightest: np.ndarray
    mean: np.ndarray
    heaviest: np.ndarray
    useful: np.ndarray
    micros: np.ndarray
    idle: np.ndarray
    short: np.ndarray
    steps_per_epoch: int
    world: int
    packed: bool

    @property
    def deviation(self) -> np.ndarray:
        """How far the worst micro-batch of each step is off the step's mean, as a share of it: ``float64 [steps]``."""
        worst = np.maximum(self.heaviest - self.mean, self.mean - self.lightest)
        return worst / np.maximum(self.mean, 1)

    @property
    def counted(self) -> np.ndarray:
        """``bool [steps]``: all but the short last batch, which counts only where there is no other."""
        return ~self.short

    def quantile(self, share: float) -> float:
        """The deviation that ``share`` of the counted steps do not exceed; each is that of a step."""
        return float(np.quantile(self.deviation[self.counted], share, method="higher"))

    def summary(self) -> str:
        """One line: the median and 90th percentile of :attr:`deviation`, and what part is padding or idle."""
        steps = int(self.counted.sum())
        if not steps:
            return "token balance: there is no step"
        if (self.micros[self.counted] == 1).all():
            line = "token balance: one micro-batch a step, nothing to balance"
        else:
            line = (
                f"token balance: worst micro-batch of a step {self.quantile(0.5):.1%} off its mean "
                f"(median over {steps:,} step{'s' * (steps > 1)}), {self.quantile(0.9):.1%} at the 90th percentile"
            )
        if not self.packed:
            line += f"; {1 - self._useful():.1%} of the computed tokens are padding"
        if idle := int(np.median(self.idle[self.counted])):
            line += f"; {idle:,} of {int(np.median(self.micros[self.counted])):,} micro-batches have no conversation"
        return line

    def _useful(self) -> float:
        weights = (self.mean * self.micros)[self.counted]
        return float(np.average(self.useful[self.counted], weights=weights)) if weights.sum() else 1.0


def token_balance(plan: Plan, world: int = 1, steps: int = DEFAULT_STEPS) -> Balance:
    """The balance over ``world`` ranks of the first epoch's first ``steps`` steps, or of all where there are fewer."""
    batches = [plan.global_batch(0, step) for step in range(min(steps, plan.steps_per_epoch))]
    computed, useful, idle = [], [], []
    for batch in batches:
        micros = [plan.lengths[micro] for micro in plan.deal_to_all(batch, world)]
        tokens = np.array([_computed(lengths, plan.packed) for lengths in micros], dtype=np.int64)
        computed.append(tokens)
        useful.append(int(plan.lengths[batch].sum()) / max(1, int(tokens.sum())))
        idle.append(sum(not len(lengths) for lengths in micros))
    short = np.zeros(len(batches), dtype=bool)
    if 1 < len(batches) == plan.steps_per_epoch:
        short[-1] = len(batches[-1]) < min(map(len, batches[:-1]))
    return Balance(
        lightest=np.array([tokens.min() for tokens in computed], dtype=np.int64),
        mean=np.array([tokens.mean() for tokens in computed], dtype=np.float64),
        heaviest=np.array([tokens.max() for tokens in computed], dtype=np.int64),
        useful=np.array(useful, dtype=np.float64),
        micros=np.array([len(tokens) for tokens in computed], dtype=np.int64),
        idle=np.array(idle, dtype=np.int64),
        short=short,
        steps_per_epoch=plan.steps_per_epoch,
        world=world,
        packed=plan.packed,
    )


def _computed(lengths: np.ndarray, packed: bool) -> int:
    """Tokens that a device computes for conversations of such ``lengths``."""
    if not len(lengths):
        return 0
    return int(lengths.sum()) if packed else len(lengths) * int(lengths.max())
