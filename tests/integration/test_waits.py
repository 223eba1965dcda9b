"""When a step waits for what the device computes: a GPU would stand still then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

READ = torch.ops.aten._local_scalar_dense.default  # a number that Python asks a tensor for


class Reads(TorchDispatchMode):
    """Keeps the types of the numbers that are read from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is READ:
            self.kinds.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


class Watch(L.Callback):
    """Notes what was read in each step, from its begin to that of the next."""

    seen: ClassVar[list[list[torch.dtype]]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.seen.clear()
        self.reads: Reads | None = None

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._close()
        self.reads = Reads()
        self.reads.__enter__()

    def on_train_end(self, *args: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self.reads is not None:
            self.reads.__exit__(None, None, None)
            self.seen.append(self.reads.kinds)


@pytest.mark.parametrize("config", ["full.yaml", "lora.yaml"])
def test_between_logged_steps_only_the_norm_of_the_gradient_is_waited_for(
    fit: Callable[..., Path], tmp_path: Path, config: str
) -> None:
    """The norm is float64. The bar's loss is float32 and on the host already, where Lightning reads it every time."""
    callback = json.dumps([{"class_path": f"{__name__}.Watch"}])
    words = ("--trainer.max_steps", "5", "--trainer.log_every_n_steps", "1000", "--evaluation.strategy", "none")
    micros = ("--data.per_device_train_batch_size", "8", "--checkpoint.checkpointing_steps", "1000")
    fit(tmp_path / "run", *words, *micros, "--trainer.callbacks", callback, config=config)
    assert Watch.seen[1:-1] == [[torch.float64, torch.float32]] * 3
