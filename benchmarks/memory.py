"""How near ``estimate`` comes to what training takes: the peak memory of real steps on the CPU beside the estimate.

    python benchmarks/memory.py                      # all cases, about half an hour on two cores
    python benchmarks/memory.py --only lora,fsdp     # those whose name has one of these words

Every case is a ``fit`` of three steps in a process of its own, on conversations of ``seq_length`` tokens which are all
supervised, as ``estimate`` takes them to be; of several ranks the first is looked at. After the first step the tensors
there are counted, and the peak of resident memory begins anew (``/proc/self/clear_refs``); measured is what is counted
plus what the peak rises until the last step's end. glibc is told to give large blocks back at once, so that the
resident memory is that of the tensors there are.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor

from mft_lightning.cli import main as run
from mft_lightning.commands.planned import PlannedRun
from mft_lightning.model.memory import peak
from mft_lightning.training.callbacks import StepLogging

ROOT = Path(__file__).resolve().parent.parent
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TEXT = "def scaled(price):\n    return price * 3 + 1\n" * 200  # longer than any conversation of a case
FEW, MANY = 2048, 50304  # rows of the vocabulary


def keys(**changed: Any) -> dict[str, str]:
    return {key.replace("__", "."): str(value) for key, value in changed.items()}


def batch(per_device: int, seq_length: int, micro_batches: int = 1, devices: int = 1) -> dict[str, str]:
    return keys(
        data__per_device_train_batch_size=per_device,
        data__total_train_batch_size=per_device * micro_batches * devices,
        data__seq_length=seq_length,
        trainer__devices=devices,
    )


def model(hidden: int, layers: int, vocabulary: int, **changed: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}
    return sizes | {"num_hidden_layers": layers, "vocab_size": vocabulary, "max_position_embeddings": 2048} | changed


def on(devices: int) -> dict[str, str]:
    return keys(trainer__devices=devices)


LORA = keys(model__peft_type="lora", model__lora__r=16)
WHOLE = keys(model__lora__modules_to_save="[embed_in,lm_head]")
QLORA = LORA | keys(model__peft_type="qlora")
EIGHT = QLORA | keys(model__qlora__bits=8)
PISSA = LORA | keys(model__lora__r=96, model__lora__dropout=0, model__lora__init="pissa_niter_4")
AGAIN = keys(model__checkpoint_activations=True)
PADDED = keys(data__padding_mode="padding")
DDP, FSDP = keys(trainer__strategy="ddp"), keys(trainer__strategy="fsdp")
TENSOR = FSDP | keys(parallel__tensor_parallel_size=2)
TRUE, MIXED = keys(trainer__precision="bf16-true"), keys(trainer__precision="bf16-mixed")
SMALL, MIDDLE, LARGE = model(256, 4, FEW), model(512, 6, MANY), model(768, 12, MANY)
TIED = model(512, 6, MANY, tie_word_embeddings=True)
# name -> the model's configuration, keys
CASES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "256 x 4, packed": (SMALL, batch(8, 256)),
    "256 x 4, padded": (SMALL, batch(8, 256) | PADDED),
    "256 x 4, packed, 3 micro-batches": (SMALL, batch(8, 256, 3)),
    "256 x 4, activations again": (SMALL, batch(16, 512) | AGAIN),
    "256 x 4, lora": (SMALL, batch(8, 256) | LORA),
    "256 x 4, lora, activations again": (SMALL, batch(16, 512) | LORA | AGAIN),
    "256 x 4, eager, padded": (SMALL, batch(4, 512) | PADDED | keys(model__attn_implementation="eager")),
    "256 x 4, eager, packed": (SMALL, batch(4, 256) | keys(model__attn_implementation="eager")),
    "256 x 4, 50k tokens": (model(256, 4, MANY), batch(2, 1024)),
    "512 x 6, packed": (MIDDLE, batch(4, 512)),
    "512 x 6, few tokens": (MIDDLE, batch(1, 64)),
    "512 x 6, few tokens, 2 micro-batches": (MIDDLE, batch(1, 64, 2)),
    "512 x 6, activations again, 2 micro-batches": (MIDDLE, batch(4, 512, 2) | AGAIN),
    "512 x 6, lora, padded": (MIDDLE, batch(4, 512) | LORA | PADDED),
    "512 x 6, lora on the head too": (
        MIDDLE,
        batch(4, 512) | LORA | keys(model__lora__target_modules="[query_key_value,lm_head]"),
    ),
    "512 x 6, lora r 96": (MIDDLE, batch(4, 512) | LORA | keys(model__lora__r=96, model__lora__dropout=0)),
    "512 x 6, lora r 96, pissa": (MIDDLE, batch(4, 512) | PISSA),
    "512 x 6, bf16-true": (MIDDLE, batch(4, 512) | TRUE),
    "512 x 6, bf16-mixed": (MIDDLE, batch(4, 512) | MIXED),
    "512 x 6, lora, embeddings and head whole": (MIDDLE, batch(4, 512) | LORA | WHOLE),
    "512 x 6, bf16-mixed, lora": (MIDDLE, batch(4, 512) | MIXED | LORA),
    "512 x 6, qlora": (MIDDLE, batch(4, 512) | QLORA),
    "512 x 6, qlora, activations again": (MIDDLE, batch(4, 512) | QLORA | AGAIN),
    "512 x 6, qlora, few tokens": (MIDDLE, batch(1, 64) | QLORA),
    "512 x 6, qlora, bf16-mixed": (MIDDLE, batch(4, 512) | QLORA | MIXED),
    "512 x 6, qlora, bf16-true": (MIDDLE, batch(4, 512) | QLORA | TRUE),
    "512 x 6, qlora in 8 bits": (MIDDLE, batch(4, 512) | EIGHT),
    "512 x 6, qlora in 8 bits, activations again": (MIDDLE, batch(4, 512) | EIGHT | AGAIN),
    "512 x 6, qlora in 8 bits, bf16-mixed": (MIDDLE, batch(4, 512) | EIGHT | MIXED),
    "256 x 4, qlora": (SMALL, batch(8, 256) | QLORA),
    "256 x 4, qlora, bf16-mixed": (SMALL, batch(8, 256) | QLORA | MIXED),
    "768 x 12, qlora, few tokens": (LARGE, batch(1, 256) | QLORA),
    "512 x 6, bf16-mixed, activations again": (MIDDLE, batch(8, 512) | MIXED | AGAIN),
    "512 x 6, gelu_fast": (model(512, 6, MANY, hidden_act="gelu_fast"), batch(4, 512)),
    "512 x 6, ddp 2": (MIDDLE, batch(4, 512, 1, 2) | DDP),
    "512 x 6, ddp 2, few tokens": (MIDDLE, batch(1, 64, 1, 2) | DDP),
    "512 x 6, ddp 2, 2 micro-batches": (MIDDLE, batch(2, 256, 2, 2) | DDP),
    "512 x 6, ddp 2, lora": (MIDDLE, batch(4, 512, 1, 2) | DDP | LORA),
    "512 x 6, fsdp 2": (MIDDLE, batch(4, 512, 1, 2) | FSDP),
    "512 x 6, fsdp 2, few tokens": (MIDDLE, batch(1, 64, 1, 2) | FSDP),
    "512 x 6, fsdp 2, 2 micro-batches": (MIDDLE, batch(2, 256, 2, 2) | FSDP),
    "512 x 6, fsdp 2, activations again": (MIDDLE, batch(8, 512, 1, 2) | FSDP | AGAIN),
    "512 x 6, fsdp 2, lora": (MIDDLE, batch(4, 512, 1, 2) | FSDP | LORA),
    "512 x 6, fsdp 2, lora, embeddings and head whole": (MIDDLE, batch(4, 512, 1, 2) | FSDP | LORA | WHOLE),
    "512 x 6, fsdp 2, bf16-mixed": (MIDDLE, batch(4, 512, 1, 2) | FSDP | MIXED),
    "512 x 6, fsdp 2, bf16-true": (MIDDLE, batch(4, 512, 1, 2) | FSDP | TRUE),
    "512 x 6, tensor 2": (MIDDLE, batch(4, 512) | TENSOR | on(2)),
    "512 x 6, tensor 2, few tokens": (MIDDLE, batch(1, 64) | TENSOR | on(2)),
    "512 x 6, tensor 2, activations again, 2 micro-batches": (MIDDLE, batch(8, 512, 2) | TENSOR | on(2) | AGAIN),
    "512 x 6, tensor 2, lora": (MIDDLE, batch(4, 512) | TENSOR | on(2) | LORA),
    "512 x 6, fsdp 2 x tensor 2": (MIDDLE, batch(2, 512, 1, 2) | TENSOR | on(4)),
    "512 x 6, fsdp 2, tied, few tokens": (TIED, batch(1, 64, 1, 2) | FSDP),
    "512 x 6, fsdp 2 x tensor 2, tied, few tokens": (TIED, batch(1, 64, 1, 2) | TENSOR | on(4)),
    "768 x 12, few tokens": (LARGE, batch(1, 256)),
    "768 x 12, packed": (LARGE, batch(2, 1024)),
    "768 x 12, activations again": (LARGE, batch(4, 1024) | AGAIN),
    "768 x 12, lora": (LARGE, batch(2, 1024) | LORA),
    "768 x 12, fsdp 2, few tokens": (LARGE, batch(1, 256, 1, 2) | FSDP),
    "768 x 12, fsdp 2, gathered layers kept": (
        LARGE,
        batch(1, 256, 1, 2) | FSDP | keys(parallel__reshard_after_forward=False),
    ),
}


def words(directory: Path, config: dict[str, Any], changed: dict[str, str]) -> list[str]:
    """Write a model and a task into a directory; the options of ``fit`` and of ``estimate`` for them."""
    where = directory / "model"
    where.mkdir()
    for file in (ROOT / "examples" / "model").iterdir():
        (where / file.name).write_bytes(file.read_bytes())
    (where / "config.json").write_text(json.dumps(json.loads((where / "config.json").read_text()) | config))
    task = directory / "task"
    task.mkdir()
    lines = (json.dumps({"text": f"# {number}\n{TEXT}"}) for number in range(4 * int(changed[TOTAL])))
    (task / "texts.jsonl").write_text("\n".join(lines))
    given = {"config": "full.yaml", "output_dir": directory / "run", "data.data_paths": f"[{task}]"}
    given |= {"data.cache_dir": directory / "cache", "model.pretrained_model_path": where, "data.num_workers": 0}
    given |= {"data.tokenize_mode": "pretrain", "data.on_overlong": "truncate", "data.data_split": "100,0,0"}
    given |= {"evaluation.strategy": "none", "trainer.max_steps": 3, "checkpoint.checkpointing_steps": 1000}
    return [f"--{key}={value}" for key, value in {**given, **changed}.items()]


TOTAL = "data.total_train_batch_size"


class Watch:
    """What memory there is after the first step, and the most there is until the end of the last."""

    def __init__(self) -> None:
        self.steps = self.counted = self.before = self.highest = 0

    def __call__(self, *given: Any) -> Any:
        self.steps += 1
        self.highest = resident("VmHWM")
        if self.steps == 1:
            gc.collect()
            self.counted, self.before = tensors(), resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        return AFTER_STEP(*given)


AFTER_STEP = StepLogging.on_train_batch_end


def tensors() -> int:
    """Bytes of all tensors' memory."""
    found = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in found)
    storages = (tensor.untyped_storage() for tensor in local if tensor.device.type == "cpu")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(argv: list[str]) -> int:
    """The bytes that three steps take at most, in this process."""
    watch = Watch()
    with patch.object(StepLogging, "on_train_batch_end", lambda *given: watch(*given)):
        if run(["fit", *argv]):
            raise SystemExit(1)
    return watch.counted + watch.highest - watch.before


def compare(config: dict[str, Any], changed: dict[str, str]) -> tuple[str, int, int]:
    """Where the peak is thought to be, the bytes estimated there, and those measured."""
    with tempfile.TemporaryDirectory() as directory:
        options = words(Path(directory), config, changed)
        moment = peak(PlannedRun(options).step())
        mine = [sys.executable, __file__, "--measure", json.dumps(options)]
        environment = {**os.environ, **GIVEN_BACK, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(mine, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return moment.name, moment.total, int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words, of which a case's name must have one")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(json.loads(options.measure)))
        return
    print("| case | estimated MiB | measured MiB | off | peak where |\n|---|---|---|---|---|")
    for name, case in CASES.items():
        if any(word in name for word in options.only.split(",")):
            where, estimated, measured = compare(*case)
            off = f"{estimated / measured - 1:+.1%}"
            print(f"| {name} | {estimated / 2**20:,.0f} | {measured / 2**20:,.0f} | {off} | {where} |", flush=True)


if __name__ == "__main__":
    main()
