"""Where each key of a run is documented."""

from __future__ import annotations

_RUN = "docs/configuration.md#keys-of-the-whole-run"
_LORA, _NEW_TOKENS = "docs/training.md#lora-and-its-relatives", "docs/training.md#tokens-that-are-new-to-the-model"
_WEIGHTINGS, _MOVING = "docs/losses.md", "docs/losses.md#weights-that-move"
_RATE, _BATCHES = "docs/training.md#learning-rate", "docs/training.md#batches"
_SPLITS, _MIXING, _VALIDATION = (
    "docs/data.md#splits",
    "docs/data.md#batch-size-and-mixing",
    "docs/training.md#validation",
)

# A key or a group of keys -> the page and its section. Of several that fit a key, the longest.
PAGES = {
    "": "--help",  # options of one command
    **dict.fromkeys(("seed_everything", "output_dir", "tensorboard_dir", "ckpt_path"), _RUN),
    "data": "docs/data.md",
    "data.valid_data_paths": _SPLITS,
    "data.data_split": _SPLITS,
    "data.tokenize_mode": "docs/data.md#pretraining",
    "data.padding_mode": _BATCHES,
    "data.total_train_batch_size": _BATCHES,
    "data.per_device_train_batch_size": _BATCHES,
    "data.per_device_valid_batch_size": _VALIDATION,
    "data.gradient_accumulation_steps": _BATCHES,
    "data.total_train_batch_tokens": _MIXING,
    "data.task_sampling": _MIXING,
    "data.task_weights": _WEIGHTINGS,
    "data.num_workers": _BATCHES,
    "data.preprocessing_num_workers": "docs/data.md#the-token-cache",
    "data.cache_dir": "docs/data.md#the-token-cache",
    "data.cache_by_contents": "docs/data.md#the-token-cache",
    "data.role_tokens": "docs/data.md#the-chat-format",
    "model": "docs/training.md#models",
    "model.lora": _LORA,
    "model.lora.start_from": "docs/training.md#starting-from-another-adapter",
    "model.lora.modules_to_save": _NEW_TOKENS,
    "model.pad_vocab_to_multiple_of": _NEW_TOKENS,
    "model.qlora": "docs/training.md#qlora",
    "model.peft_type": _LORA,
    "model.checkpoint_activations": "docs/memory.md",
    "model.compile_layers": "docs/speed.md#compiled-layers",
    **dict.fromkeys(
        (
            *("model.optimizer", "model.learning_rate", "model.min_lr", "model.num_warmup_steps", "model.weight_decay"),
            *("model.lr_scheduler_type", "model.lr_power", "model.lr_num_cycles"),
            *("model.adam_beta1", "model.adam_beta2", "model.adam_epsilon"),
        ),
        _RATE,
    ),
    **dict.fromkeys(
        (*("model.weighted_loss_mode", "model.label_smoothing", "model.z_loss", "model.focal_gamma"),),
        _WEIGHTINGS,
    ),
    **dict.fromkeys(("model.coba", "model.famo"), _MOVING),
    "model.max_skipped_steps": "docs/training.md#losses",
    "evaluation": _VALIDATION,
    "evaluation.samples_per_task": "docs/monitoring.md#answers-to-read",
    "early_stopping": _VALIDATION,
    "checkpoint": "docs/checkpoints.md",
    "parallel": "docs/parallel.md#options",
    "trainer": "docs/training.md",
    "trainer.precision": "docs/training.md#models",
    "trainer.strategy": "docs/parallel.md",
    "trainer.devices": "docs/parallel.md",
    "trainer.num_nodes": "docs/parallel.md",
    "trainer.accelerator": "docs/parallel.md",
    "trainer.gradient_clip_val": _RATE,
    "trainer.callbacks": "docs/own_classes.md#callbacks",
    "trainer.logger": "docs/own_classes.md#loggers",
}


def page(key: str) -> str:
    """The page and section of a key, or of the group that it is in."""
    while key not in PAGES:
        key = key.rpartition(".")[0]
    return PAGES[key]
