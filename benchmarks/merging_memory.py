"""How much memory ``merge`` needs beside the model that it writes, and how much peft's own merge needs.

    python benchmarks/merging_memory.py [--hidden 1024] [--layers 12] [--vocabulary 50304] [--rank 96]

A random GPT-NeoX of that shape is saved with a LoRA adapter of all its linear layers. Prints how far the resident
memory of a process rises above what it was before it merges the two: by ``merge``, which checks the base's digest too,
in files of at most ``mft_lightning.model.export.PART`` bytes; and by ``merge_and_unload`` and ``save_pretrained``.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from mft_lightning import cli
from mft_lightning.commands import merge  # noqa: F401  # imported before it is measured
from mft_lightning.model import export
from mft_lightning.model.base import base_digest, base_state
from mft_lightning.training.checkpoint_dirs import FORMAT_VERSION, write_metadata

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def write(directory: Path, hidden: int, layers: int, vocabulary: int, rank: int) -> int:
    """A base, and an adapter as a run's checkpoint has it; the bytes of the base."""
    shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}
    base = AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=vocabulary, num_hidden_layers=layers, **shape))
    base.save_pretrained(directory / "base")
    base.name_or_path = str(directory / "base")
    model = get_peft_model(base, LoraConfig(r=rank, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapter = directory / "adapter"
    model.save_pretrained(adapter)
    for file in (ROOT / "examples" / "model").glob("tokenizer*"):
        (adapter / file.name).write_bytes(file.read_bytes())
    frozen = base_state(model)
    said = {"format": FORMAT_VERSION, "step": 1, "epoch_end": False, "metrics": {}, "processes": 1, "chat_format": {}}
    write_metadata(adapter, {**said, "fingerprint": {"frozen base (digest)": base_digest(frozen)}})
    return sum(tensor.nbytes for tensor in frozen.values())


def with_peft(adapter: Path, output: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)


def measure(way: str, adapter: Path, output: Path, part: int) -> None:
    """Print by how many bytes the resident memory rises, and the seconds."""
    before, start = resident("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    if way == "peft":
        with_peft(adapter, output)
    else:
        with patch.object(export, "PART", part):
            if cli.main(["merge", "--adapter", str(adapter), "--output", str(output)]):
                raise SystemExit(1)
    print(resident("VmHWM") - before, time.perf_counter() - start)


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def run(way: str, directory: Path, part: int = export.PART) -> tuple[int, float]:
    """What a process of its own measures."""
    words = [sys.executable, __file__, "--measure", way, str(directory / "adapter"), str(directory / way), str(part)]
    environment = {**os.environ, **GIVEN_BACK, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rise, seconds = done.stdout.splitlines()[-1].split()
    return int(rise), float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--rank", type=int, default=96)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        size = write(Path(directory), options.hidden, options.layers, options.vocabulary, options.rank)
        print(f"model {size / MIB:.0f} MiB, files of at most {export.PART / MIB:.0f} MiB")
        for way in ("merge", "peft"):
            rise, seconds = run(way, Path(directory))
            print(f"{way:5}  rises by {rise / MIB:5.0f} MiB  {seconds:4.1f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
