"""What saving a checkpoint costs: how long training waits for it, what is written beside the training, and the bytes.

    python benchmarks/checkpoint.py --model DIR --tasks DIR,DIR [--steps 41] [--every 8] [--rank 96]

``--model`` needs a configuration and a tokenizer; the weights are drawn. Each kind of training runs once. Prints
medians: how long a save holds up the thread that trains and how long of that it copies tensors, how long the other
thread then writes, a step without and with a write beside it; and the bytes of a checkpoint beside its weights' alone.
"""

import argparse
import tempfile
import threading
import time
from math import nan
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from mft_lightning.cli import main as run
from mft_lightning.model.module import MFTModule
from mft_lightning.training import checkpoint_io
from mft_lightning.training.checkpoint import HFModelCheckpoint
from mft_lightning.training.checkpoint_choice import find_checkpoints
from mft_lightning.training.checkpoint_io import HFCheckpointIO

KINDS = {"full": [], "lora": ["--model.peft_type=lora"]}
SAVE, WRITE, COPY = HFModelCheckpoint._save, HFCheckpointIO._write, checkpoint_io._in_own_memory
STEP = MFTModule.training_step


class Clock:
    """Seconds of every stall, copy, write, and step, the steps by whether a checkpoint was written beside them."""

    def __init__(self) -> None:
        self.stalls: list[float] = []
        self.copies: list[float] = []
        self.writes: list[float] = []
        self.steps: dict[bool, list[float]] = {False: [], True: []}
        self._begin: float | None = None
        self._beside = False
        self._writing = threading.Event()

    def step(self, *given: Any) -> Any:
        now = time.perf_counter()
        if self._begin is not None:
            self.steps[self._beside].append(now - self._begin)
        self._begin, self._beside = now, self._writing.is_set()
        return STEP(*given)

    def save(self, callback: HFModelCheckpoint, trainer: Any) -> None:
        callback._background.wait()  # for the write before, which in a longer run would be over
        self._begin = None
        start = time.perf_counter()
        SAVE(callback, trainer)
        self.stalls.append(time.perf_counter() - start)

    def copy(self, *given: Any, **named: Any) -> dict[str, Any]:
        start = time.perf_counter()
        copied = COPY(*given, **named)
        self.copies.append(time.perf_counter() - start)
        return copied

    def write(self, *given: Any) -> None:
        self._writing.set()
        start = time.perf_counter()
        WRITE(*given)
        self.writes.append(time.perf_counter() - start)
        self._writing.clear()


def measure(words: list[str], directory: Path) -> tuple[Clock, int, int]:
    """The times of a run, and the bytes of its last checkpoint and of the weights in it."""
    clock = Clock()
    with (
        patch.object(HFModelCheckpoint, "_save", lambda *given: clock.save(*given)),
        patch.object(HFCheckpointIO, "_write", lambda *given: clock.write(*given)),
        patch.object(checkpoint_io, "_in_own_memory", clock.copy),
        patch.object(MFTModule, "training_step", lambda *given: clock.step(*given)),
    ):
        if run([*words, f"--output_dir={directory}"]):
            raise SystemExit(1)
    sizes = {file.name: file.stat().st_size for file in find_checkpoints(directory)[-1].path.iterdir()}
    return clock, sum(sizes.values()), sum(size for name, size in sizes.items() if name.endswith(".safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--steps", type=int, default=41)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--rank", type=int, default=96)
    options = parser.parse_args()
    words = ["fit", "--config=configs/full.yaml", f"--model.pretrained_model_path={options.model}"]
    words += [f"--data.data_paths=[{options.tasks}]", "--evaluation.strategy=none", "--data.num_workers=0"]
    words += ["--data.total_train_batch_size=4", "--data.per_device_train_batch_size=4"]
    words += [f"--trainer.max_steps={options.steps}", f"--checkpoint.checkpointing_steps={options.every}"]
    rows = []
    for kind, more in KINDS.items():
        rank = [f"--model.lora.r={options.rank}"] if kind == "lora" else []
        with tempfile.TemporaryDirectory() as directory:
            clock, size, weights = measure([*words, *more, *rank], Path(directory) / kind)
        stall, copy, write = (median(values) for values in (clock.stalls, clock.copies, clock.writes))
        alone, beside = (median(clock.steps[which] or [nan]) for which in (False, True))  # of none where all is quick
        rows.append(
            f"{kind:8}  {stall:7.3f}  {copy:9.3f}  {write:7.2f}  {alone:6.2f}  {beside:12.2f}  {size / 1e6:13.1f}  "
            f"{weights / 1e6:10.1f}  {size / weights:5.2f}"
        )
    print(
        "\ntraining  stall s  of it copy  write s  step s  beside write  checkpoint MB  weights MB  ratio",
        *rows,
        sep="\n",
    )


if __name__ == "__main__":
    main()
