"""A few steps of ``fit`` on a GPT-NeoX's configuration, its weights drawn, that a benchmark's callback watches."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from mft_lightning.cli import main as run
from mft_lightning.data.cores import available_cores


def steps_parser(doc: str | None, steps: str) -> argparse.ArgumentParser:
    """What benchmarks of steps are told.

    Args:
        doc: the benchmark's own.
        steps: which of the steps are counted by ``--steps``.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a GPT-NeoX's config.json and tokenizer")
    parser.add_argument("--data", nargs="+", required=True, help="task directories")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--method", choices=("full", "lora", "qlora"), default="full")
    parser.add_argument("--steps", type=int, default=5, help=steps)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("more", nargs="*", help="options of fit, after --")
    return parser


def run_steps(options: argparse.Namespace, steps: int, *words: str) -> int:
    """Run ``fit``; its exit code.

    Args:
        options: of :func:`steps_parser`.
        steps: optimizer steps, each of about 2,000 tokens where conversations are short.
        words: more of the command line.
    """
    torch.set_num_threads(options.threads)
    given: dict[str, Any] = {"data.data_paths": f"[{','.join(options.data)}]", "data.data_split": "100,0,0"}
    given |= {"data.total_train_batch_size": 10, "data.per_device_train_batch_size": 10, "data.seq_length": 2048}
    given |= {"model.pretrained_model_path": options.model, "model.init": "random", "evaluation.strategy": "none"}
    given |= {"trainer.accelerator": options.device, "trainer.devices": 1, "trainer.precision": options.precision}
    given |= {"trainer.max_steps": steps, "trainer.gradient_clip_val": 1.0}
    given |= {"trainer.log_every_n_steps": 1, "checkpoint.checkpointing_steps": 1_000_000}
    if options.method != "full":
        given |= {"model.peft_type": options.method, "model.lora.r": 16, "model.lora.dropout": 0}
    with tempfile.TemporaryDirectory() as directory:
        given["output_dir"] = Path(directory) / "run"
        return run(["fit", *(f"--{key}={value}" for key, value in given.items()), *options.more, *words])
