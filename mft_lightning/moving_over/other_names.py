"""Keys of this program by the names that they have elsewhere: in the original, in transformers, TRL and the like."""

from __future__ import annotations

from mft_lightning.moving_over.old_options import OPTIONS

# a key here, what else is to be said of it, and its names elsewhere; the original's options are in their own table
_NAMES = (
    # data
    ("data.data_paths", "", "dataset datasets dataset_name dataset_path train_file train_data"),
    ("data.seq_length", "", "max_seq_length max_seq_len max_length cutoff_len sequence_len"),
    ("data.total_train_batch_size", "of a step, on all devices", "batch_size train_batch_size global_batch_size"),
    ("data.gradient_accumulation_steps", "", "grad_accum grad_accumulation_steps accumulate_grad_batches"),
    ("data.per_device_valid_batch_size", "", "eval_batch_size"),
    ("data.num_workers", "", "dataloader_num_workers"),
    ("data.padding_mode", "pack", "packing"),
    # model
    ("model.pretrained_model_path", "", "model_name_or_path model_name model_path base_model model_id"),
    ("model.tokenizer_path", "", "tokenizer_name"),
    ("model.peft_type", "lora or qlora", "use_lora use_peft adapter finetuning_type"),
    ("model.peft_type", "qlora", "load_in_4bit use_qlora"),
    ("model.qlora.bits", "8, with model.peft_type: qlora", "load_in_8bit"),
    ("model.lora.r", "", "lora_r rank"),
    ("model.lora.target_modules", "", "lora_target_modules"),
    ("model.compile_layers", "", "torch_compile"),
    # optimizer
    ("model.learning_rate", "", "lr max_lr"),
    ("model.optimizer", "", "optim"),
    ("model.lr_scheduler_type", "", "lr_scheduler scheduler"),
    ("model.num_warmup_steps", "", "warmup_steps lr_warmup_steps"),
    ("model.num_warmup_steps", "in steps, no share of the run", "warmup_ratio"),
    ("trainer.gradient_clip_val", "", "grad_clip clip_grad_norm"),
    # the run
    ("trainer.max_epochs", "", "epochs num_epochs n_epochs"),
    ("trainer.devices", "", "gpus"),
    ("trainer.precision", "bf16-mixed", "bf16"),
    ("trainer.precision", "16-mixed", "fp16"),
    ("trainer.strategy", "fsdp, or DeepSpeedStrategy by its class_path", "deepspeed fsdp"),
    ("trainer.logger", "", "report_to"),
    ("trainer.log_every_n_steps", "", "logging_steps"),
    ("tensorboard_dir", "", "logging_dir"),
    ("output_dir", "", "output out_dir save_dir"),
    ("ckpt_path", "last, best or a directory", "resume resume_from"),
    ("evaluation.steps", "", "eval_steps eval_interval"),
    ("checkpoint.checkpointing_steps", "", "save_steps save_interval"),
)
OTHER_NAMES = {name: (key, says) for key, says, names in _NAMES for name in names.split()}


def key_here(name: str) -> tuple[str, str] | None:
    """The key that a name or a key of another program means, and what else is to be said of it; None of others.

    Args:
        name: like ``lr``, or in a group of whatever name, like ``training.lr``, ``lora.rank``.
    """
    parts = name.split(".")
    for word in ("_".join(parts[at:]) for at in range(len(parts))):
        if word in OTHER_NAMES:
            return OTHER_NAMES[word]
        option = OPTIONS.get(word)
        if option is not None and option.fate == "mapped" and not option.key.startswith("("):
            keys = option.key.split(", ")
            return next((key for key in keys if key.rpartition(".")[2] == word), keys[0]), ""
    return None
