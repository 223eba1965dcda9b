"""What balancers add to a step: FAMO and CoBa on the quickstart, the time of their hook beside that of whole steps.

    python benchmarks/balancer_cost.py [--steps 60]

Prints, for each, medians over the steps: the whole step, the balancer's part of it, and of that the forward passes of
validation batches, which CoBa looks at and FAMO does without.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L

from mft_lightning.cli import main as run
from mft_lightning.model.supervised_loss import SupervisedLM
from mft_lightning.training.balancing import Balancing

WORDS = ["fit", "--config=configs/quickstart.yaml", "--evaluation.strategy=none", "--data.num_workers=0"]
WORDS += ["--evaluation.exact_match_per_task=null", "--model.coba.warmup_steps=10"]


class Clock(L.Callback):
    """Seconds of parts of every step; a step's end is the next one's beginning."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = defaultdict(list)
        self._before = 0.0
        self._balancing = False

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        now = time.perf_counter()
        if self._before:
            self.parts["step"].append(now - self._before)
        self._before = now

    def timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method`` with its time added to ``name``; forward passes count inside of a balancer's hook alone."""

        def call(*given: Any, **named: Any) -> Any:
            if name == "forward" and not self._balancing:
                return method(*given, **named)
            start, self._balancing = time.perf_counter(), True
            result = method(*given, **named)
            self.parts[name].append(time.perf_counter() - start)
            self._balancing = name == "forward"
            return result

        return call


def measure(mode: str, steps: int) -> dict[str, float]:
    """Median seconds of a step and its parts."""
    clock, hook, forward, setup = Clock(), Balancing.on_train_batch_end, SupervisedLM.forward, Balancing.setup
    Balancing.on_train_batch_end = clock.timed("balancer", hook)  # type: ignore[method-assign]
    SupervisedLM.forward = clock.timed("forward", forward)  # type: ignore[method-assign]
    Balancing.on_train_batch_start = lambda _, *given: clock.on_train_batch_start(*given)  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as directory:
            words = [word for word in WORDS if mode == "coba" or "coba" not in word]
            words += [f"--model.weighted_loss_mode={mode}", f"--trainer.max_steps={steps}"]
            if run([*words, f"--output_dir={Path(directory) / 'run'}"]):
                raise SystemExit(1)
    finally:
        Balancing.on_train_batch_end, SupervisedLM.forward = hook, forward  # type: ignore[method-assign]
        Balancing.setup = setup  # type: ignore[method-assign]
    return {name: median(values) for name, values in clock.parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    found = {mode: measure(mode, steps) for mode in ("famo", "coba")}
    print("\nbalancer  step ms  balancer ms  share  its forward ms  beyond it ms  share")
    for mode, parts in found.items():
        step, balancer, forward = (1000 * parts.get(name, 0.0) for name in ("step", "balancer", "forward"))
        beyond = balancer - forward
        print(
            f"{mode:8}  {step:7.1f}  {balancer:11.3f}  {balancer / step:5.2%}  {forward:14.3f}  {beyond:12.3f}  "
            f"{beyond / step:5.2%}"
        )


if __name__ == "__main__":
    main()
