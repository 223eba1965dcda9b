"""What balancers add to a step: FAMO and CoBa on the quickstart, the time of their hook beside that of whole steps.

    python benchmarks/balancer_cost.py [--steps 60]

Prints, for each, medians over the steps: the whole step, the balancer's part of it, and of that the forward passes of
the validation batch, which CoBa looks at and FAMO does without.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from mft_lightning.cli import main as run
from mft_lightning.model.module import MFTModule
from mft_lightning.model.supervised_loss import SupervisedLM
from mft_lightning.training.balancing import Balancing

WORDS = ["fit", "--config=configs/quickstart.yaml", "--evaluation.strategy=none", "--data.num_workers=0"]
WORDS += ["--evaluation.exact_match_per_task=null"]


class Clock:
    """Seconds of every step, of the balancer's hook in it, and of the forward passes in that."""

    def __init__(self) -> None:
        self.begins: list[float] = []
        self.hooks: list[float] = []
        self.forwards: list[float] = []
        self._in_hook = False

    def step(self, *given: Any) -> Any:
        self.begins.append(time.perf_counter())
        return STEP(*given)

    def hook(self, *given: Any) -> None:
        self.forwards.append(0.0)
        self._in_hook = True
        start = time.perf_counter()
        HOOK(*given)
        self.hooks.append(time.perf_counter() - start)
        self._in_hook = False

    def forward(self, *given: Any) -> Any:
        start = time.perf_counter()
        result = FORWARD(*given)
        if self._in_hook:
            self.forwards[-1] += time.perf_counter() - start
        return result


STEP, HOOK, FORWARD = MFTModule.training_step, Balancing.on_train_batch_end, SupervisedLM.forward


def measure(mode: str, steps: int) -> list[float]:
    """Median milliseconds of a step, of the balancer, and of its forward passes."""
    clock = Clock()
    words = [*WORDS, f"--model.weighted_loss_mode={mode}", f"--trainer.max_steps={steps}"]
    words += ["--model.coba.warmup_steps=10"] if mode == "coba" else []
    with (
        tempfile.TemporaryDirectory() as directory,
        patch.object(MFTModule, "training_step", lambda *given: clock.step(*given)),
        patch.object(Balancing, "on_train_batch_end", lambda *given: clock.hook(*given)),
        patch.object(SupervisedLM, "forward", lambda *given: clock.forward(*given)),
    ):
        if run([*words, f"--output_dir={Path(directory) / 'run'}"]):
            raise SystemExit(1)
    whole = [later - earlier for earlier, later in zip(clock.begins, clock.begins[1:], strict=False)]
    return [1000 * median(values) for values in (whole, clock.hooks, clock.forwards)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    found = {mode: measure(mode, steps) for mode in ("famo", "coba")}
    print("\nbalancer  step ms  balancer ms  share of it  forward ms  balancer beyond it ms  share")
    for mode, (step, balancer, forward) in found.items():
        beyond = balancer - forward
        print(
            f"{mode:8}  {step:7.1f}  {balancer:11.2f}  {balancer / step:11.2%}  {forward:10.2f}  {beyond:21.2f}  "
            f"{beyond / step:5.2%}"
        )


if __name__ == "__main__":
    main()
