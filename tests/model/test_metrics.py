"""Metrics reach callbacks as Lightning's own way would bring them there, at a cost that many tasks can bear."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from mft_lightning.model.metrics import tell_callbacks

METRICS = {"loss/a": 1.5, "loss/b": torch.tensor(2.5, dtype=torch.float64)}


class Told(BoringModel):
    def __init__(self, *, by_lightning: bool) -> None:
        super().__init__()
        self.by_lightning = by_lightning
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, *given: Any) -> None:
        if self.by_lightning:
            self.log_dict(METRICS, logger=False)
        elif self.trainer.global_step == 1:  # what was told stays until it is told anew
            with patch.object(self, "log", side_effect=AssertionError("takes long")):
                tell_callbacks(self.trainer, METRICS)

    def on_train_epoch_end(self) -> None:
        self.seen.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})


@pytest.mark.parametrize("by_lightning", [False, True])
def test_callbacks_find_what_they_are_told(by_lightning: bool) -> None:
    module = Told(by_lightning=by_lightning)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    L.Trainer(accelerator="cpu", max_epochs=2, limit_train_batches=3, limit_val_batches=1, **quiet).fit(module)
    assert len(module.seen) == 2 and all(seen.items() >= {"loss/a": 1.5, "loss/b": 2.5}.items() for seen in module.seen)
