"""The runs that ``kills.py`` kills: together they go through everything that a resume has to bring back."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import DROPPING, TINY
from tests.integration.conftest import ROOT, TASKS

STEPS = 30  # optimizer steps of a run, five an epoch
EPOCHS = 6
CONVERSATIONS = 15  # of each task, twelve of them to train on
PATIENT = ("--early_stopping.patience", "100")
IN_PARTS = ("--data.per_device_train_batch_size", "2")  # several micro-batches a step
WORKERS = ("--data.num_workers", "2")
SELDOM = ("--trainer.log_every_n_steps", "7")  # so that what loggers hold back is more than a step's
PADDED = ("--data.padding_mode", "padding")
BY_EPOCHS = ("--trainer.max_steps", "-1", "--trainer.max_epochs", str(EPOCHS), "--evaluation.strategy", "steps,epoch")


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        name: of its directory and in the table.
        words: what it has beside the words of all runs.
        ranks: how many processes.
        config: the file that it starts from.
    """

    name: str
    words: tuple[str, ...]
    ranks: int = 1
    config: str = "full.yaml"


def _full(name: str, mode: str, *words: str, ranks: int = 1, config: str = "full.yaml") -> Case:
    return Case(name, ("--model.weighted_loss_mode", mode, *words), ranks, config)


def _lora(name: str, mode: str, *words: str, ranks: int = 1) -> Case:
    dropout = ("--model.lora.r", "4", "--model.lora.dropout", "0.1")
    return _full(name, mode, *dropout, *words, ranks=ranks, config="lora.yaml")


COBA = ("--model.coba.warmup_steps", "4", "--model.coba.history_length", "6", "--model.coba.update_interval", "2")
TENSOR, SHARDED = ("--parallel.tensor_parallel_size", "2"), ("--checkpoint.sharded", "true")
DDP, FSDP = ("--trainer.strategy", "ddp"), ("--trainer.strategy", "fsdp")

CASES = (
    _full("full-case1-padding", "case1", *PADDED, *BY_EPOCHS, "--checkpoint.save_strategy", "steps,epoch"),
    _lora("lora-case2-workers", "case2", *WORKERS, *PATIENT),
    _full("full-case3-focal", "case3", "--model.focal_gamma", "2", *IN_PARTS, *PATIENT),
    _lora("lora-case4-epochs", "case4", *PADDED, *IN_PARTS, "--checkpoint.extra_save_by_epoch", "true"),
    _full("full-coba-workers", "coba", *COBA, *WORKERS),
    _lora("lora-famo", "famo", *IN_PARTS, *SELDOM),
    _full("ddp-full-famo", "famo", *DDP, *PADDED, *PATIENT, ranks=2),
    _lora("ddp-lora-case3", "case3", *DDP, *IN_PARTS, ranks=2),
    _full("fsdp-full-case4", "case4", *FSDP, *IN_PARTS, *BY_EPOCHS, *SELDOM, ranks=2),
    _lora("fsdp-lora-coba", "coba", *FSDP, *COBA, ranks=2),
    _full("tensor-full-sharded", "case3", *FSDP, *TENSOR, *SHARDED, *IN_PARTS, ranks=2),
    _lora("fsdp-lora-sharded", "case3", *FSDP, *SHARDED, *PATIENT, ranks=2),
)


def prepare(directory: Path) -> None:
    """Put a tiny model with dropout, without weights, and the examples' shortest conversations below ``directory``."""
    model = directory / "model"
    shutil.copytree(ROOT / "examples" / "model", model)
    config = json.loads((model / "config.json").read_text()) | TINY | DROPPING
    (model / "config.json").write_text(json.dumps(config))
    for task in TASKS:
        lines = (ROOT / "examples" / "quickstart" / task / "part_0.jsonl").read_text().splitlines(keepends=True)
        (directory / "tasks" / task).mkdir(parents=True)
        (directory / "tasks" / task / "part.jsonl").write_text("".join(sorted(lines, key=len)[:CONVERSATIONS]))


def fit_words(case: Case, directory: Path, output_dir: Path) -> list[str]:
    """The command line of a case on what was prepared in ``directory``."""
    words = {
        "--config": str(ROOT / "configs" / case.config),
        "--output_dir": str(output_dir),
        "--data.data_paths": f"[{','.join(str(directory / 'tasks' / task) for task in TASKS)}]",
        "--data.data_split": "80,20,0",
        "--data.num_workers": "0",
        "--data.total_train_batch_size": "8",
        "--model.pretrained_model_path": str(directory / "model"),
        "--model.learning_rate": "1e-2",
        "--model.num_warmup_steps": "2",
        "--trainer.max_epochs": "null",
        "--trainer.max_steps": str(STEPS),
        "--trainer.log_every_n_steps": "1",
        "--evaluation.steps": "4",
        "--evaluation.samples_per_task": "0",
        "--checkpoint.checkpointing_steps": "3",
        "--checkpoint.save_total_limit": "2",
    }
    return ["fit", *(word for pair in words.items() for word in pair), *case.words]
