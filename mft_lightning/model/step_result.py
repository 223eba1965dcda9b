"""What an optimizer step leaves behind for the logs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from mft_lightning.data.collate import MicroBatch, StepBatch
from mft_lightning.model.flops import UsefulFlops
from mft_lightning.model.supervised_loss import SupervisedNLL


@dataclass
class StepResult:
    """Sums over this rank's part of a step, and counts of the whole; tensors stay on the device until someone reads.

    Attributes:
        loss: the minimised loss, this rank's part, ``float64 []``.
        nll: summed NLL of each task, this rank's part, ``float64 [K]``.
        correct: tokens of each task that were the most likely one, this rank's part, ``float64 [K]``.
        task_supervised: supervised tokens of each task in the global batch, ``int64 [K]``.
        tokens: tokens of the global batch.
        flops: useful operations of the step, on all ranks together.
        learning_rate: of this step.
        numbers: of the conversations of each of this rank's micro-batches, ``int64 [C]``.
        conversation_nll: their summed NLL, ``[C]``.
        grad_norm: global norm before clipping; the step was skipped if it is not finite.
    """

    loss: Tensor
    nll: Tensor
    correct: Tensor
    task_supervised: Tensor
    tokens: int
    flops: int
    learning_rate: float
    numbers: list[Tensor] = field(default_factory=list)
    conversation_nll: list[Tensor] = field(default_factory=list)
    grad_norm: float | None = None

    @classmethod
    def of(cls, batch: StepBatch, useful: UsefulFlops, learning_rate: float) -> Self:
        """That of a step which has not begun."""
        zeros = torch.zeros_like(batch.task_supervised, dtype=torch.float64)
        flops = useful.of_step(batch.tokens, batch.supervised, batch.squared_lengths)
        return cls(zeros.sum(), zeros, zeros.clone(), batch.task_supervised, batch.tokens, flops, learning_rate)

    def add(self, micro: MicroBatch, found: SupervisedNLL) -> None:
        """Add a micro-batch and what its forward gave."""
        self.loss += found.loss.detach()
        self.nll.index_add_(0, micro.tasks, found.nll.double())
        self.correct.index_add_(0, micro.tasks, found.correct.double())
        self.numbers.append(micro.numbers)
        self.conversation_nll.append(found.nll)

    @property
    def skipped(self) -> bool:
        """Whether the optimizer left everything as it was, on every rank."""
        assert self.grad_norm is not None
        return not math.isfinite(self.grad_norm)
