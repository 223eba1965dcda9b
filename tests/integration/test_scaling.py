"""The bytes that the cost model says ranks send are those that they send."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.cost_model import FLOAT32, Layout, Micro, Shape, collectives
from benchmarks.scaling import WARM
from tests.conftest import TINY
from tests.integration.layouts import in_series

LAYOUTS = {
    "ddp": Layout("ddp", 2),
    "fsdp": Layout("fsdp", 2),
    "tensor": Layout("fsdp", 2, tensor=2, checkpointing=True),
}


def test_ranks_send_what_the_model_says(
    fit_arguments: Callable[..., list[str]], tiny_model: Path, tmp_path: Path
) -> None:
    lines = []
    for name, layout in LAYOUTS.items():
        (tmp_path / name).mkdir()
        words = ["--trainer.strategy", layout.strategy, "--trainer.max_steps", str(WARM + 1)]
        words += ["--evaluation.strategy", "none", "--data.per_device_train_batch_size", "4"]
        words += ["--parallel.tensor_parallel_size", str(layout.tensor)]
        words += ["--model.checkpoint_activations", str(layout.checkpointing).lower()]
        words += ["--trainer.callbacks+=benchmarks.scaling.Meter", "--trainer.callbacks.steps=0"]
        words += [f"--trainer.callbacks.directory={tmp_path / name}"]
        lines.append(["fit", *fit_arguments(tmp_path / name / "run", *words)])
    in_series(2, lines, tmp_path)

    vocabulary = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    shape = Shape(TINY["hidden_size"], TINY["num_hidden_layers"], TINY["intermediate_size"], vocabulary)
    for name, layout in LAYOUTS.items():
        for rank in range(layout.devices):
            told = json.loads((tmp_path / name / f"{rank}.json").read_text())
            micros = [Micro(**micro) for micro in told["work"][0]]
            assert len(micros) > 1
            counted: Counter[str] = Counter()
            for kind, size, group, times in told["profiled"][0]["counted"]:
                assert group in (0, 2)
                counted[kind] += 4 * size * times
            expected: Counter[str] = Counter()
            for one in collectives(shape, layout, micros, FLOAT32):
                expected[one.kind] += one.size * one.times
            assert counted == expected, (name, rank)
