"""transformers' Trainer on the work: rows padded by its own collator, or packed by ``DataCollatorWithFlattening``.

python -m benchmarks.throughput.hf_trainer DIRECTORY SETTING METHOD PRECISION

It trains on token ids that are ready in memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.throughput.pausing import Gate
from benchmarks.throughput.workload import Workload

SETTINGS = ("packed", "padded")


class Pause(TrainerCallback):
    """Waits before every step."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.gate.pause()


class Gated:
    """Of a Trainer: tells what every micro-batch adds to a step's loss."""

    gate: Gate

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.gate.add(loss)
        return loss


class GatedTrainer(Gated, Trainer):
    """transformers' own, but for that."""


def read_model(workload: Workload, method: str, precision: str) -> Any:
    """The base, with the adapter on it if it is to train one, held as ``precision`` says."""
    options: dict[str, Any] = {"dtype": torch.bfloat16 if precision == "bf16-true" else torch.float32}
    options["attn_implementation"] = workload.attention
    if method == "qlora":
        from transformers import BitsAndBytesConfig

        computed = torch.float32 if precision == "32-true" else torch.bfloat16
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=computed,
        )
        options["device_map"] = {"": workload.device}
    model = AutoModelForCausalLM.from_pretrained(workload.model, **options)
    if method == "full":
        return model
    from peft import PeftModel, prepare_model_for_kbit_training

    if method == "qlora" and precision != "bf16-true":  # where it would make embeddings, norms and head float32
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    # else peft would hold the adapter of a bfloat16 base in float32
    return PeftModel.from_pretrained(model, workload.adapter, is_trainable=True, autocast_adapter_dtype=False)


def read_tokenizer(workload: Workload) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def arguments(workload: Workload, precision: str) -> dict[str, Any]:
    """Of ``TrainingArguments``, and of TRL's, which has other defaults: what decides the steps, and no saving."""
    adam = workload.adam
    return {
        "output_dir": str(Path(workload.directory) / "trainer"),
        "max_steps": workload.steps,
        "per_device_train_batch_size": workload.rows,
        "gradient_accumulation_steps": workload.micro_batches,
        "train_sampling_strategy": "sequential",
        "learning_rate": adam["lr"],
        "lr_scheduler_type": "constant",
        "adam_beta1": adam["betas"][0],
        "adam_beta2": adam["betas"][1],
        "adam_epsilon": adam["eps"],
        "weight_decay": adam["weight_decay"],
        "max_grad_norm": workload.clip,
        "bf16": precision == "bf16-mixed",
        "gradient_checkpointing": False,
        "use_cpu": workload.device == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def main(directory: str, setting: str, method: str, precision: str) -> None:
    workload = Workload.read(directory)
    model, tokenizer = read_model(workload, method, precision), read_tokenizer(workload)
    flash = workload.attention.startswith("flash")
    collator = (
        DataCollatorWithFlattening(return_flash_attn_kwargs=flash)
        if setting == "packed"
        else DataCollatorForSeq2Seq(tokenizer)
    )
    gate = Gate(workload.device)
    trainer = GatedTrainer(
        model=model,
        args=TrainingArguments(**arguments(workload, precision)),
        train_dataset=workload.read_conversations(),
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[Pause(gate)],
    )
    trainer.gate = gate
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
