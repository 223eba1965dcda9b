"""litgpt's own training loops, ``finetune/full.py`` and ``finetune/lora.py``, on the work.

python -m benchmarks.throughput.litgpt_finetune DIRECTORY SETTING METHOD PRECISION

Its model attends causally to the whole row and takes no positions or mask in training, so rows cannot be packed without
mixing conversations: they are padded. Its loops do not clip gradients, so the optimizer does before it steps. It has
an adapter for each of queries, keys and values, where the others have one for all three, so adapters cannot start from
the same weights; before they have learned anything they change nothing. The loss of several micro-batches is the mean
of their means.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.loggers.logger import Logger
from litgpt import lora, model
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data.base import get_sft_collate_fn
from litgpt.finetune import full as full_loop
from litgpt.finetune import lora as lora_loop
from litgpt.scripts.convert_hf_checkpoint import copy_weights_gpt_neox
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from benchmarks.throughput.pausing import Gate
from benchmarks.throughput.workload import Workload

SETTINGS = ("padded",)


class LossLogger(Logger):
    """Takes the loss that litgpt logs."""

    name, version = "throughput", 0

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.gate.loss = metrics.get("loss", self.gate.loss)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


class GatedBatches:
    """A loader that waits before it hands out a step's first micro-batch."""

    def __init__(self, loader: DataLoader[Any], gate: Gate, micro_batches: int) -> None:
        self.loader, self.gate, self.micro_batches = loader, gate, micro_batches
        self.dataset = loader.dataset

    def __iter__(self) -> Any:
        for number, batch in enumerate(self.loader):
            if number % self.micro_batches == 0:
                self.gate.pause()
            yield batch

    def __len__(self) -> int:
        return len(self.loader)


def read_config(workload: Workload, kind: type[Any], **adapters: Any) -> Any:
    """litgpt's configuration for transformers' of a GPT-NeoX."""
    found = json.loads((Path(workload.model) / "config.json").read_text())
    rope = found.get("rope_parameters") or {}
    return kind(
        block_size=found["max_position_embeddings"],
        n_layer=found["num_hidden_layers"],
        n_embd=found["hidden_size"],
        n_head=found["num_attention_heads"],
        intermediate_size=found["intermediate_size"],
        vocab_size=found["vocab_size"],
        padded_vocab_size=found["vocab_size"],
        norm_eps=found["layer_norm_eps"],
        parallel_residual=found["use_parallel_residual"],
        rotary_percentage=rope.get("partial_rotary_factor", found.get("rotary_pct")),
        rope_base=int(rope.get("rope_theta", found.get("rotary_emb_base", 10000))),
        **adapters,
    )


def make_model(workload: Workload, method: str, fabric: L.Fabric) -> Any:
    if method == "lora":
        names = ("query", "key", "value", "projection", "mlp")
        adapters = {"lora_r": workload.rank, "lora_alpha": 2 * workload.rank} | {f"lora_{name}": True for name in names}
        config = read_config(workload, lora.Config, **adapters)
    else:
        config = read_config(workload, model.Config)
    with fabric.init_module(empty_init=False):
        made = (lora.GPT if method == "lora" else model.GPT)(config)
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(Path(workload.model).glob("*.safetensors")):
        copy_weights_gpt_neox(config, stored, load_file(file))
    found = made.load_state_dict(stored, strict=method == "full")
    assert all("lora_" in name for name in found.missing_keys) and not found.unexpected_keys
    if method == "lora":
        lora.mark_only_lora_as_trainable(made)
    return fabric.setup_module(made)


def batches(workload: Workload, conversations: list[dict[str, list[int]]], fabric: L.Fabric) -> DataLoader[Any]:
    samples = [
        {key: torch.tensor(conversation[key]) for key in ("input_ids", "labels")}
        | {"token_counts": {"raw": 0, "raw_plus_prompt_template": len(conversation["input_ids"])}}
        for conversation in conversations
    ]
    loader: Any = DataLoader(samples, batch_size=workload.rows, collate_fn=get_sft_collate_fn())
    return fabric.setup_dataloaders(loader)


def main(directory: str, setting: str, method: str, precision: str) -> None:
    workload = Workload.read(directory)
    gate = Gate(workload.device)
    fabric = L.Fabric(accelerator=workload.device, devices=1, precision=precision, loggers=LossLogger(gate))
    made = make_model(workload, method, fabric)
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, **workload.adam, fused=True)
    adam.register_step_pre_hook(lambda *args: torch.nn.utils.clip_grad_norm_(trained, workload.clip) and None)
    scheduler = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1.0)
    optimizer = fabric.setup_optimizers(adam)
    conversations = workload.read_conversations()
    given: dict[str, Any] = {
        "fabric": fabric,
        "train_dataloader": GatedBatches(batches(workload, conversations, fabric), gate, workload.micro_batches),
        "val_dataloader": batches(workload, [{key: ids[:8] for key, ids in conversations[0].items()}], fabric),
        "devices": 1,
        "checkpoint_dir": Path(workload.model),
        "out_dir": Path(workload.directory),
        "train": TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=workload.conversations,
            micro_batch_size=workload.rows,
            lr_warmup_steps=0,
            epochs=1,
            max_steps=workload.steps,
        ),
        "eval": EvalArgs(interval=1_000_000),
        "data": None,
    }
    if method == "lora":
        lora_loop.fit(model=made, optimizer=optimizer, scheduler=scheduler, **given)
    else:
        state = {"model": made, "optimizer": optimizer, "scheduler": scheduler, "iter_num": 0, "step_count": 0}
        full_loop.fit(state=state, resume=False, **given)


if __name__ == "__main__":
    main(*sys.argv[1:])
