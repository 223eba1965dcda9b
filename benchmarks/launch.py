"""How long from launching ``fit`` until its first forward begins, and how much of that is imports nobody can avoid?

    python benchmarks/launch.py
    python benchmarks/launch.py --config configs/lora.yaml --data.data_paths "[data/arithmetic]"

Words that are no option here are handed on to ``fit``. Data that was prepared before leaves tokenising out of account.
Beside it stands what it takes to import torch, lightning and transformers alone, in turns with the launches, as a busy
machine slows both. Seconds are medians; the exit code is 1 if a first forward begins after the limit.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 10.0
MARK = "FIRST FORWARD"
IMPORTS = f"import lightning, os, time, torch, transformers; print('{MARK}', time.time(), sum(os.times()[:2]))"


class FirstForward(L.Callback):
    """Tells when the network is first asked for a loss, in training or in the validation before it, and ends there."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pl_module.network.register_forward_pre_hook(_tell_and_end)


def _tell_and_end(module: nn.Module, inputs: object) -> None:
    print(MARK, time.time(), sum(os.times()[:2]), flush=True)
    os._exit(0)


def seconds(words: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds from the launch of Python with ``words`` until it prints the mark."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    start = time.time()
    run = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    found = [line for line in run.stdout.splitlines() if line.startswith(MARK)]
    if not found:
        raise SystemExit(run.stdout + run.stderr + "benchmark: no forward began.")
    at, cpu = found[0].removeprefix(MARK).split()
    return float(at) - start, float(cpu)


def main() -> None:
    """Launch in turns, print a table, and compare with the limit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"))
    parser.add_argument("--repeats", type=int, default=3)
    options, handed_on = parser.parse_known_args()
    fit = ["-m", "mft_lightning", "fit", "--config", options.config, *handed_on]
    fit += ["--trainer.callbacks+", "launch.FirstForward", "--output_dir"]
    measured: dict[str, list[tuple[float, float]]] = {"imports alone": [], "first forward": []}
    for _ in range(options.repeats):
        measured["imports alone"].append(seconds(["-c", IMPORTS]))
        with tempfile.TemporaryDirectory() as directory:
            measured["first forward"].append(seconds([*fit, str(Path(directory) / "run")]))
    print(f"{'':15} {'wall s':>7} {'CPU s':>7}")
    medians = {}
    for name, found in measured.items():
        medians[name], cpu = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"{name:15} {medians[name]:7.2f} {cpu:7.2f}")
    print(f"{'limit':15} {LIMIT:7.2f}")
    raise SystemExit(int(medians["first forward"] > LIMIT))


if __name__ == "__main__":
    main()
