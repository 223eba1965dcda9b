"""What ``model.compile_layers`` costs in the first step, and gains in those after it.

    python benchmarks/compiled_layers.py --model DIR --data TASK TASK TASK --precision bf16-true --method lora

Runs ``fit``, packed, and computes in every second step with the layers as they are, so that both ways meet the same
neighbours. Compilers keep what they made: with a fresh directory in TORCHINDUCTOR_CACHE_DIR the first step shows what a
machine's first run pays, without it what all others do.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.few_steps import run_steps, steps_parser
from mft_lightning.data.collate import StepBatch
from mft_lightning.model.parallel import transformer_layers

WARM_UP = 4  # steps that do not count


class InTurns(L.Callback):
    """``--trainer.callbacks+=benchmarks.compiled_layers.InTurns``: layers compiled in every second step."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.layers = transformer_layers(cast(Any, pl_module).network)
        self.forwards: list[Any] = [layer.forward for layer in self.layers]
        self.seconds: list[tuple[float, float]] = []  # of a step, and of each of its tokens
        self.settle = torch.cuda.synchronize if pl_module.device.type == "cuda" else lambda: None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: StepBatch, batch_idx: int) -> None:
        compiled = len(self.seconds) % 2 == 0
        for layer, forward in zip(self.layers, self.forwards, strict=True):
            layer.forward = forward if compiled else forward.plain
        self.settle()
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.settle()
        taken = time.perf_counter() - self.start
        self.seconds.append((taken, taken / batch.tokens))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        compiled, plain = (statistics.median(each for _, each in self.seconds[WARM_UP + way :: 2]) for way in range(2))
        first, second = self.seconds[0][0], self.seconds[2][0]
        tokens = statistics.median(taken / each for taken, each in self.seconds)
        print(f"\nfirst compiled step {first:.1f} s, second {second:.1f} s")
        print(f"a token takes {1e6 * compiled:,.0f} µs compiled, {1e6 * plain:,.0f} not: {compiled / plain:.3f}")
        gained = (plain - compiled) * tokens
        print(f"the first step pays back after {first / gained:,.0f} steps" if gained > 0 else "it does not pay back")


def main(argv: list[str] | None = None) -> int:
    options = steps_parser(__doc__, "compiled ones, and as many that are not").parse_args(argv)
    callback = ("--trainer.callbacks", '[{"class_path": "benchmarks.compiled_layers.InTurns"}]')
    return run_steps(options, WARM_UP + 2 * options.steps, "--model.compile_layers", "true", *callback)


if __name__ == "__main__":
    raise SystemExit(main())
