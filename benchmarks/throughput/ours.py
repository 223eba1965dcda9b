"""This program: ``fit``, as it is typed, with a callback that waits before every step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.throughput.pausing import Gate
from benchmarks.throughput.workload import Workload

SETTINGS = {"packed": "pack", "padded": "padding"}  # of data.padding_mode


class Pause(L.Callback):
    """``--trainer.callbacks+=benchmarks.throughput.ours.Pause``

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.gate = Gate(device)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.gate.pause()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.gate.loss = pl_module.last_step.loss


def fit_options(workload: Workload, setting: str, method: str, precision: str) -> list[str]:
    """The options of ``fit``.

    Args:
        workload: what to do.
        setting: a key of ``SETTINGS``.
        method: "full", "lora" or "qlora".
        precision: as ``trainer.precision`` has it.
    """
    adam = workload.adam
    given: dict[str, Any] = {
        "output_dir": Path(workload.directory) / f"run, {setting}, {method}, {precision}",
        "data.data_paths": f"[{','.join(workload.tasks)}]",
        "data.data_split": "100,0,0",
        "data.padding_mode": SETTINGS[setting],
        "data.seq_length": workload.seq_length,
        "data.cache_dir": Path(workload.directory) / "cache",
        "data.total_train_batch_size": workload.conversations,
        "data.per_device_train_batch_size": workload.rows,
        "model.pretrained_model_path": workload.model,
        "model.attn_implementation": workload.attention,
        "model.weighted_loss_mode": "case1",
        "model.learning_rate": adam["lr"],
        "model.min_lr": adam["lr"],
        "model.lr_scheduler_type": "constant",
        "model.num_warmup_steps": 0,
        "model.weight_decay": adam["weight_decay"],
        "model.adam_beta1": adam["betas"][0],
        "model.adam_beta2": adam["betas"][1],
        "model.adam_epsilon": adam["eps"],
        "trainer.accelerator": workload.device,
        "trainer.devices": 1,
        "trainer.precision": precision,
        "trainer.max_epochs": 1,
        "trainer.gradient_clip_val": workload.clip,
        "trainer.log_every_n_steps": 1,
        "evaluation.strategy": "none",
        "checkpoint.checkpointing_steps": 1_000_000,
    }
    if method != "full":
        given |= {"model.peft_type": method, "model.lora.start_from": workload.adapter, "model.lora.dropout": 0}
    return [f"--{key}={value}" for key, value in given.items()]


def words(workload: Workload, setting: str, method: str, precision: str) -> list[str]:
    """What Python is given to run a contender."""
    pause = {"class_path": f"{__name__}.Pause", "init_args": {"device": workload.device}}
    options = fit_options(workload, setting, method, precision)
    return ["-m", "mft_lightning", "fit", *options, f"--trainer.callbacks={json.dumps([pause])}"]
