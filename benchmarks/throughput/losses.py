"""Whether contenders minimise the same loss: theirs beside this program's in float32, step by step."""

from __future__ import annotations

import math

from benchmarks.throughput.turns import Measured

TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 5e-3, "bf16-true": 5e-3}  # of a loss, relative


def loss_off(measured: Measured, reference: list[float]) -> float:
    """The largest relative difference from ``reference`` in any step, or in the first where adapters are others.

    Not a number where a loss is none.
    """
    steps = None if measured.contender.same_adapters else 1
    pairs = list(zip(measured.losses, reference, strict=True))[:steps]
    differences = [abs(loss / wanted - 1) for loss, wanted in pairs]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def is_other_loss(measured: Measured, reference: list[float]) -> bool:
    """Whether that is more than its precision explains; a loss that is not a number is another one."""
    return not loss_off(measured, reference) <= TOLERANCE[measured.contender.precision]
