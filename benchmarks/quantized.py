"""What a base in 4 or 8 bits takes: bytes that are held, and the most there is while it is made of whole weights.

    python -m benchmarks.quantized MODEL             # a directory with config.json; weights are drawn
    python -m benchmarks.quantized MODEL --hidden 1024 --layers 12

Every kind is made in a process of its own; the peak is of resident memory, as in ``memory.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoConfig

from benchmarks.memory import GIVEN_BACK, resident
from mft_lightning.model.quantized import held_bytes, materialise_quantized, quantize
from mft_lightning.model.settings import QLoraSettings
from mft_lightning.model.weights import DrawnWeights, sketch
from mft_lightning.quiet import quieten

KINDS = {
    "float32": None,
    "8 bits": QLoraSettings(bits=8),
    "nf4": QLoraSettings(compute_dtype="float32", double_quant=False),
    "nf4, double quantised": QLoraSettings(compute_dtype="float32"),
}


def measure(model: str, kind: str, hidden: int | None, layers: int | None) -> dict[str, int]:
    """Bytes held, of them in transformer layers, and the rise of the peak."""
    config = AutoConfig.from_pretrained(model)
    if hidden is not None:
        config.hidden_size, config.intermediate_size, config.num_attention_heads = hidden, 4 * hidden, hidden // 64
    config.num_hidden_layers = layers or config.num_hidden_layers
    made = sketch(config, torch.float32)
    weights = DrawnWeights(deepcopy(made), torch.float32, 42)
    if (settings := KINDS[kind]) is not None:
        quantize(made, settings)
    sizes = {name: held_bytes(parameter) for name, parameter in made.named_parameters()}
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    materialise_quantized(made, weights)
    within = sum(size for name, size in sizes.items() if ".layers." in name)
    return {"held": sum(sizes.values()), "layers": within, "peak": resident("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quieten()
    if options.measure:
        print(json.dumps(measure(options.model, options.measure, options.hidden, options.layers)))
        return
    print("| base | held MiB | in transformer layers | peak |\n|---|---|---|---|")
    environment = {**os.environ, **GIVEN_BACK, "OMP_NUM_THREADS": "1"}
    for kind in KINDS:
        line = [sys.executable, "-m", "benchmarks.quantized", *sys.argv[1:], "--measure", kind]
        done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"| {kind} |" + "".join(f" {found[name] / 2**20:,.1f} |" for name in ("held", "layers", "peak")))


if __name__ == "__main__":
    main()
