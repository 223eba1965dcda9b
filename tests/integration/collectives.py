"""Counts what ranks say to each other while a step computes its gradients; ``trainer.callbacks`` brings it in."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
from torch.profiler import ProfilerActivity, profile


class Collectives(L.Callback):
    """Writes the collectives of every step, by name, as a line of JSON.

    Args:
        file: where to.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.profile: profile | None = None

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU])
        self.profile.__enter__()

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        assert self.profile is not None
        self.profile.__exit__(None, None, None)
        names = Counter(event.name for event in self.profile.events() if event.name.startswith("c10d::"))
        if trainer.is_global_zero:
            with self.file.open("a") as handle:
                print(json.dumps(names), file=handle)
