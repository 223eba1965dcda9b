"""How much makes an optimizer step and a micro-batch: what is given, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mft_lightning.errors import UserError

DEFAULT_TOTAL, DEFAULT_PER_DEVICE = 32, 8
MOST = 2**40  # conversations or tokens of a step, above any there are


@dataclass(frozen=True)
class BatchSizes:
    """What one optimizer step and one micro-batch hold.

    Attributes:
        total: conversations of a step; None where tokens are counted.
        per_device: conversations of a micro-batch; None where steps of so many tokens go to ``accumulation`` of them.
        accumulation: micro-batches per device and step; None where it follows from the conversations of each step.
        tokens: most tokens of a step; None where conversations are counted.
    """

    total: int | None
    per_device: int | None
    accumulation: int | None
    tokens: int | None = None

    def micro_batches(self, conversations: int, world: int) -> int:
        """Micro-batches that each of ``world`` ranks gets of a step of so many conversations."""
        if self.per_device is None:
            assert self.accumulation is not None
            return self.accumulation
        return ceil(conversations / (world * self.per_device))


def derive_batch_sizes(
    total: int | None, per_device: int | None, accumulation: int | None, devices: int = 1, tokens: int | None = None
) -> BatchSizes:
    """Fill in what is not given: total and per device give the accumulation, per device and accumulation the total.

    With ``tokens`` the conversations of a step vary: either the micro-batch is given or the number of micro-batches.

    Raises:
        UserError: a number below 1 or beyond all data, or numbers that contradict each other.
    """
    given = {
        "data.total_train_batch_size": total,
        "data.per_device_train_batch_size": per_device,
        "data.gradient_accumulation_steps": accumulation,
        "data.total_train_batch_tokens": tokens,
    }
    for key, value in given.items():
        if value is not None and value < 1:
            raise UserError(f"{key}: {value} is less than 1.")
        if value is not None and value > MOST:
            raise UserError(f"{key}: {value} is more than {MOST:,}, which no step holds.")
    if tokens is not None:
        return _token_batches(tokens, total, per_device, accumulation)
    if per_device is None and accumulation is None:
        total = total or DEFAULT_TOTAL
    if per_device is None and total is not None and accumulation is not None:
        per_device = ceil(total / (devices * accumulation))
        if ceil(total / (devices * per_device)) != accumulation:
            raise UserError(
                f"data.gradient_accumulation_steps: {accumulation} micro-batches on {devices} device(s) cannot share "
                f"out data.total_train_batch_size: {total} evenly. Leave it out, or change one of them."
            )
    if per_device is None:
        per_device = min(DEFAULT_PER_DEVICE, ceil(total / devices)) if total is not None else DEFAULT_PER_DEVICE
    if total is None:
        total = devices * per_device * (accumulation or 1)
    expected = ceil(total / (devices * per_device))
    if accumulation is not None and accumulation != expected:
        raise UserError(
            f"data.total_train_batch_size: {total} on {devices} device(s) with data.per_device_train_batch_size: "
            f"{per_device} takes {expected} micro-batches, but data.gradient_accumulation_steps is {accumulation}. "
            "Leave one of the three out."
        )
    return BatchSizes(total, per_device, expected)


def _token_batches(tokens: int, total: int | None, per_device: int | None, accumulation: int | None) -> BatchSizes:
    if total is not None:
        raise UserError(
            f"data.total_train_batch_tokens: {tokens} and data.total_train_batch_size: {total} both say how much a "
            "step holds. Leave one of them out."
        )
    if per_device is not None and accumulation is not None:
        raise UserError(
            f"data.total_train_batch_tokens: {tokens} leaves the conversations of a step open, but "
            f"data.per_device_train_batch_size: {per_device} and data.gradient_accumulation_steps: {accumulation} "
            "fix them. Leave one of the three out."
        )
    if accumulation is None:
        per_device = per_device or DEFAULT_PER_DEVICE
    return BatchSizes(None, per_device, accumulation, tokens)
