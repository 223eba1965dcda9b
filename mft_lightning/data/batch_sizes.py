"""How many conversations make an optimizer step and a micro-batch: what is given, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mft_lightning.errors import UserError

DEFAULT_TOTAL, DEFAULT_PER_DEVICE = 32, 8


@dataclass(frozen=True)
class BatchSizes:
    """Conversations of one optimizer step (``total``), of one micro-batch, and micro-batches per device and step."""

    total: int
    per_device: int
    accumulation: int


def derive_batch_sizes(
    total: int | None, per_device: int | None, accumulation: int | None, devices: int = 1
) -> BatchSizes:
    """Fill in what is not given: total and per device give the accumulation, per device and accumulation the total.

    Raises:
        UserError: a number below 1, or three numbers that contradict each other.
    """
    given = {
        "data.total_train_batch_size": total,
        "data.per_device_train_batch_size": per_device,
        "data.gradient_accumulation_steps": accumulation,
    }
    for key, value in given.items():
        if value is not None and value < 1:
            raise UserError(f"{key}: {value} is less than 1.")
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
