"""Exact per-task sums over micro-batches and ranks, and the way of metrics to callbacks."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric


def tell_callbacks(trainer: L.Trainer, metrics: Mapping[str, float | Tensor]) -> None:
    """Put metrics where callbacks look for them, as Lightning's LearningRateMonitor does.

    ``LightningModule.log`` does so too, but takes a third of a millisecond for each: it moves what it keeps of a metric
    to the device, attribute by attribute (``_ResultCollection.log`` in Lightning 2.6). Some hundred tasks are as many
    metrics, several times.
    """
    trainer.callback_metrics.update({name: torch.as_tensor(value) for name, value in metrics.items()})


class TaskSums(Metric):
    """Sums of NLL, supervised tokens and correct tokens per task; reduced over ranks by addition.

    The means are taken once from the sums, so they do not depend on batch size or on how many ranks there are. The sums
    are float64: keep this out of a module's tree, or a precision plugin will cast them to the weights' dtype.

    Args:
        names: the tasks' names, in the order of their numbers.
    """

    full_state_update = False
    nll: Tensor
    tokens: Tensor
    correct: Tensor

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for state in ("nll", "tokens", "correct"):
            self.add_state(state, torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, tasks: Tensor, nll: Tensor, tokens: Tensor, correct: Tensor) -> None:
        """Add conversations: task numbers, summed NLL, supervised and correct tokens of each, all ``[C]``."""
        for state, values in ((self.nll, nll), (self.tokens, tokens), (self.correct, correct)):
            state.index_add_(0, tasks, values.detach().to(state.dtype))

    def compute(self) -> dict[str, Tensor]:
        """``loss`` (mean over tasks of each task's token mean), and ``loss/``, ``perplexity/``, ``accuracy/<task>``.

        Tasks without a token are left out.
        """
        present = self.tokens > 0
        loss, accuracy = self.nll / self.tokens, self.correct / self.tokens
        values = {"loss": loss[present].mean()}
        for name, per_task in (("loss", loss), ("perplexity", loss.exp()), ("accuracy", accuracy)):
            values |= {f"{name}/{self.names[k]}": per_task[k] for k in present.nonzero().flatten().tolist()}
        return values
