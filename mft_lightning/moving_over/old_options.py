"""Every option of the original's parsers, and what becomes of it.

The tables are what conversion goes by, what ``docs/moving_over.md`` prints, and what tests hold against the lists of
the original's options: none may be missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from mft_lightning.moving_over.ignored_options import IGNORED, LAUNCHERS_OWN, REFUSED

Kind = Literal["text", "whole", "number", "flag", "list", "numbers", "any"]
SCRIPT, CONFIG, COMMAND, LAUNCHER = "run_gpt_*.sh", "*_train_config.json", "mft_accelerate.py", "launcher"


@dataclass(frozen=True)
class Option:
    """An option of the original.

    Attributes:
        name: as the original writes it.
        kind: of its value.
        key: where it lives here; empty of one that is ignored or refused.
        says: what is different here, or why it is ignored or refused; empty where it means the same.
        fate: what becomes of it.
    """

    name: str
    kind: Kind
    key: str = ""
    says: str = ""
    fate: Literal["mapped", "ignored", "refused"] = "mapped"


_SPLIT = (
    "normalised to 100 here, and each share has its own use; the original trained on the first, of all files one after "
    "the other, and validated on all the rest"
)
_STEPS = "in optimizer steps; the original counted micro-batches where gradients accumulate"
_MAPPED = (
    # data
    Option("data_paths", "list", "data.data_paths"),
    Option("data_split", "text", "data.data_split", _SPLIT),
    Option("data_weights", "numbers", "data.task_weights", "weights of the tasks' losses; the original used none"),
    Option("task_weights", "numbers", "data.task_weights", "scaled to mean 1, over the whole global batch"),
    Option("load_raw_dataset", "flag", "(data.data_paths)", "always JSONL here; false is refused"),
    Option("tokenize_mode", "text", "data.tokenize_mode", "sst and pretrain are one thing; coh is refused"),
    Option("train_mode", "text", "(data.tokenize_mode)", "sft; anything else is refused"),
    Option(
        "padding_mode",
        "text",
        "data.padding_mode",
        "pack lays whole conversations end to end, isolated from each other, and batch sizes go on counting "
        "conversations; concat is for tokenize_mode pretrain",
    ),
    Option("seq_length", "whole", "data.seq_length"),
    Option(
        "total_train_batch_size",
        "whole",
        "data.total_train_batch_size",
        "conversations of one optimizer step, accumulation included; not multiplied by tensor parallelism",
    ),
    Option("per_device_train_batch_size", "whole", "data.per_device_train_batch_size"),
    Option("micro_batch_size", "whole", "data.per_device_train_batch_size"),
    Option(
        "gradient_accumulation_steps",
        "whole",
        "data.total_train_batch_size, data.gradient_accumulation_steps",
        "part of the total, where the number of devices is known",
    ),
    Option("per_device_valid_batch_size", "whole", "data.per_device_valid_batch_size"),
    Option("per_device_eval_batch_size", "whole", "data.per_device_valid_batch_size"),
    Option("num_workers", "whole", "data.num_workers"),
    Option("preprocessing_num_workers", "whole", "data.preprocessing_num_workers"),
    Option("eos_token", "text", "data.eos_token"),
    Option("pad_token", "text", "data.pad_token"),
    # model
    Option("pretrained_model_path", "text", "model.pretrained_model_path"),
    Option("config_path", "text", "model.pretrained_model_path", "with model.init: random, where there is no other"),
    Option("tokenizer_path", "text", "model.tokenizer_path"),
    Option("model_type", "text", "model.model_type"),
    Option("trust_remote_code", "flag", "model.trust_remote_code", "false unless asked for"),
    Option("peft_type", "text", "model.peft_type", "lora, qlora or none; other kinds are refused"),
    Option("bits", "whole", "model.qlora.bits"),
    Option("quantization", "text", "model.qlora.bits", "of qlora alone"),
    Option("lora_rank", "whole", "model.lora.r"),
    Option("lora_alpha", "number", "model.lora.alpha"),
    Option("lora_dropout", "number", "model.lora.dropout"),
    Option("target_modules", "list", "model.lora.target_modules", "null is GPT-NeoX's four linear layers"),
    Option("checkpoint_activations", "flag", "model.checkpoint_activations"),
    Option("gradient_checkpointing", "flag", "model.checkpoint_activations"),
    Option(
        "attn_implementation",
        "text",
        "model.attn_implementation",
        "sdpa computes the same, with a GPU's flash kernels; flash_attention_2 can be set by hand",
    ),
    Option("flash_attention", "flag", "model.attn_implementation", "sdpa, with a GPU's flash kernels"),
    Option(
        "make_vocab_size_divisible_by",
        "whole",
        "model.pad_vocab_to_multiple_of",
        "embeddings grow only where the tokenizer needs it",
    ),
    Option("weighted_loss_mode", "text", "model.weighted_loss_mode", "taken over the global batch, not each device's"),
    *(
        Option(f"coba_{key}", "whole", f"model.coba.{key}", "of weighted_loss_mode coba alone")
        for key in ("warmup_steps", "history_length", "tau", "update_interval", "sample_valid_num")
    ),
    # optimizer
    Option("learning_rate", "number", "model.learning_rate"),
    Option("min_lr", "number", "model.min_lr", "where the decay ends; the original decayed to 0"),
    Option("weight_decay", "number", "model.weight_decay", "not on biases and layer norms"),
    Option("adam_beta1", "number", "model.adam_beta1"),
    Option("adam_beta2", "number", "model.adam_beta2"),
    Option("adam_epsilon", "number", "model.adam_epsilon"),
    Option("lr_scheduler_type", "text", "model.lr_scheduler_type"),
    Option("custom_lr_scheduler_type", "text", "model.lr_scheduler_type", "before lr_scheduler_type"),
    Option("num_warmup_steps", "number", "model.num_warmup_steps", "a share of the run is refused: give the steps"),
    Option("max_grad_norm", "number", "trainer.gradient_clip_val", "the norm over all devices"),
    # the run
    Option("num_train_epochs", "whole", "trainer.max_epochs"),
    Option("max_steps", "whole", "trainer.max_steps", "before num_train_epochs"),
    Option("max_train_steps", "whole", "trainer.max_steps", "before num_train_epochs"),
    Option("tp", "whole", "parallel.tensor_parallel_size"),
    Option("dp", "whole", "trainer.devices", "devices of one node; with tp"),
    Option("distributed_type", "text", "trainer.strategy", "fsdp is FSDP2; deepspeed becomes fsdp"),
    Option("bf16", "flag", "trainer.precision", "bf16-mixed"),
    Option("fp16", "flag", "trainer.precision", "16-mixed; refused where devices share out the weights"),
    Option("seed", "whole", "seed_everything", "it decides split and order too, which are others than the original's"),
    Option("output_dir", "text", "output_dir"),
    Option("tensorboard_dir", "text", "tensorboard_dir", "used here; the original wrote to output_dir/runs"),
    Option("tb_dir", "text", "tensorboard_dir"),
    Option("log_interval", "whole", "trainer.log_every_n_steps", _STEPS),
    # validations
    Option("evaluation_strategy", "text", "evaluation.strategy", "a run also validates at its start and its end"),
    Option("valid_interval", "whole", "evaluation.steps", _STEPS),
    Option("evalation_steps", "whole", "evaluation.steps", _STEPS),
    Option("evaluation_steps", "whole", "evaluation.steps", "in optimizer steps"),
    Option(
        "valid_iters",
        "whole",
        "evaluation.max_conversations_per_task",
        "conversations of each task, whatever the batch size and devices; the original took batches, and all of them "
        "with a model below a billion weights",
    ),
    Option("early_stopping_patience", "whole", "early_stopping.patience", "validations; -1 is off"),
    Option("early_stopping", "flag", "early_stopping.patience", "false is -1"),
    Option("early_stopping_stall_num", "whole", "early_stopping.patience", "validations"),
    # checkpoints
    Option("save_strategy", "text", "checkpoint.save_strategy", "a new best and the run's end save too"),
    Option("checkpointing_steps", "whole", "checkpoint.checkpointing_steps", _STEPS),
    Option("save_total_limit", "whole", "checkpoint.save_total_limit", "of step checkpoints; null keeps all"),
    Option("saving_limit", "whole", "checkpoint.save_total_limit", "of step checkpoints; null keeps all"),
    Option("extra_save_by_epoch", "flag", "checkpoint.extra_save_by_epoch"),
    Option("epoch_checkpointing", "flag", "checkpoint.extra_save_by_epoch"),
    Option("metric_for_best_model", "text", "checkpoint.monitor", "loss is val/loss, the mean over tasks"),
    Option("greater_is_better", "text", "checkpoint.mode"),
    Option(
        "resume_from_checkpoint",
        "text",
        "ckpt_path, model.lora.start_from, model.pretrained_model_path",
        "weights go on; steps, optimizer and data order of a run of the original do not",
    ),
    Option("auto_resume", "flag", "ckpt_path", "last"),
    # launchers
    Option("train_config", "text", "(the file is read)"),
    Option("nproc_per_node", "whole", "trainer.devices"),
    Option("num_gpus", "whole", "trainer.devices"),
    Option("nnodes", "text", "trainer.num_nodes"),
    Option("num_nodes", "whole", "trainer.num_nodes"),
    Option("num_machines", "whole", "trainer.num_nodes"),
    Option("num_processes", "whole", "trainer.devices", "of one node here"),
    Option("mixed_precision", "text", "trainer.precision"),
    Option("gradient_clipping", "number", "trainer.gradient_clip_val"),
    Option("use_deepspeed", "flag", "trainer.strategy", "fsdp shares out what ZeRO does"),
    Option("use_fsdp", "flag", "trainer.strategy", "FSDP2"),
    Option(
        "zero_stage", "whole", "parallel.reshard_after_forward", "true is stage 3; stage 0 is trainer.strategy: ddp"
    ),
    Option("offload_optimizer_device", "text", "parallel.cpu_offload", "weights and gradients move too"),
    Option("offload_param_device", "text", "parallel.cpu_offload", "optimizer states move too"),
    Option("fsdp_sharding_strategy", "text", "parallel.reshard_after_forward"),
    Option("fsdp_offload_params", "flag", "parallel.cpu_offload"),
)

OPTIONS = {
    option.name: option
    for option in (
        *_MAPPED,
        *(Option(name, "any", says=why, fate="ignored") for name, why in IGNORED.items()),
        *(Option(name, "any", says=why, fate="ignored") for name, why in LAUNCHERS_OWN.items()),
        *(Option(name, "any", says=why, fate="refused") for name, why in REFUSED.items()),
    )
}

# What the original took where an option is not given.
DEFAULTS: dict[str, dict[str, object]] = {
    SCRIPT: {
        "tokenize_mode": "sft",
        "padding_mode": "padding",
        "model_type": "gpt_neox",
        "learning_rate": 1e-5,
        "weight_decay": 0.0,
        "lr_scheduler_type": "linear",
        "num_warmup_steps": 100,
        "num_train_epochs": 3,
        "total_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "per_device_valid_batch_size": 8,
        "evaluation_strategy": "steps",
        "valid_iters": 100,
        "valid_interval": 1000,
        "save_strategy": "steps",
        "early_stopping_patience": -1,
    },
    CONFIG: {
        "data_split": "98,2,0",
        "tokenize_mode": "sft",
        "padding_mode": "padding",
        "seq_length": 4096,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "model_type": "gpt_neox",
        "peft_type": "qlora",
        "lora_rank": 96,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "weighted_loss_mode": "case3",
        "learning_rate": 5e-5,
        "min_lr": 5e-6,
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine",
        "num_warmup_steps": 300,
        "num_train_epochs": 4,
        "seed": 1234,
        "log_interval": 10,
        "evaluation_steps": 100,
        "checkpointing_steps": 100,
        "early_stopping": True,
        "early_stopping_stall_num": 5,
        "auto_resume": True,
    },
}


def as_markdown() -> str:
    """All options as the table of ``docs/moving_over.md``."""
    rows = ["| option | here | |", "|---|---|---|"]
    for (here, says), options in groupby(OPTIONS.values(), lambda option: (_here(option), option.says)):
        rows.append(f"| {', '.join(f'`{option.name}`' for option in options)} | {here} | {says} |")
    return "\n".join(rows)


def _here(option: Option) -> str:
    if option.fate != "mapped":
        return option.fate
    return ", ".join(key if key.startswith("(") else f"`{key}`" for key in option.key.split(", "))
