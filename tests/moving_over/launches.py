"""Launches of the original in its own shapes: the scripts with four values, and the JSON files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mft_lightning.errors import UserError
from mft_lightning.moving_over.original import Converted, convert

VALUES = ("10", "1", "8", "5")  # per-device batch size, tensor parallel, data parallel, epochs

SCRIPT_HEAD = """\
#!/bin/bash
RAW=True
if [ ${RAW} = "True" ]; then
  RAW="--load_raw_dataset"
  DATA_PATHS="$DATA_PATHS"
  WEIGHTS="[1.,1.,...,1.]"
  SPLIT="90,10,0"
  SHUFFLE=""
else
  RAW=""
  SPLIT="95,5,0"
  SHUFFLE="--shuffle_before_split"
fi
MODEL_TYPE="gpt_neox"
BASE="$MODEL_NAME_OR_PATH"
PER_DEVICE=$1
TP=$2
DP=$3
EPOCH=$4
TOTAL=$(($PER_DEVICE * $TP * $DP))
OUTPUT="$OUTPUT_DIR"
mkdir -p $OUTPUT || true
echo "output to $OUTPUT"
chmod 777 $OUTPUT

python -m atorch.distributed.launch \\
    --nproc_per_node=$(nvidia-smi -L | wc -l) \\
    run_train.py \\
    ${RAW} ${SHUFFLE} \\
"""
SCRIPT_OPTIONS = {
    "tokenize_mode": "'sft'",
    "train_mode": "'sft'",
    "padding_mode": "'padding'",
    "pretrained_model_path": "$BASE",
    "vocab_file": "vocab.json",
    "model_type": "$MODEL_TYPE",
    "padding": "",
    "data_paths": "$DATA_PATHS",
    "data_weights": "$WEIGHTS",
    "data_split": "$SPLIT",
    "train_iters": "100",
    "num_warmup_steps": "30",
    "custom_lr_scheduler_type": "'cosine'",
    "learning_rate": "5.0e-5",
    "min_lr": "1.0e-6",
    "valid_iters": "400",
    "valid_interval": "500",
    "num_train_epochs": "$EPOCH",
    "seq_length": "4096",
    "total_train_batch_size": "$TOTAL",
    "per_device_valid_batch_size": "$PER_DEVICE",
    "seed": "42",
    "preprocessing_num_workers": "6",
    "num_workers": "8",
    "output_dir": "$OUTPUT",
    "tensorboard_dir": "$TensorBoard_DIR",
    "ignore_mismatched_sizes": "",
    "skip_atorch_autoacc_dryrun": "",
    "tp": "$TP",
    "dp": "$DP",
    "bf16": "",
    "checkpointing_steps": "500",
    "log_interval": "10",
    "make_vocab_size_divisible_by": "128",
    "weighted_loss_mode": "'case3'",
    "peft_type": "'lora'",
    "checkpoint_activations": "",
    "resume_from_checkpoint": "false",
    "max_grad_norm": "1",
    "evaluation_strategy": '"steps,epoch"',
    "save_strategy": '"steps"',
    "save_total_limit": "2",
    "extra_save_by_epoch": "",
    "metric_for_best_model": "'loss'",
    "greater_is_better": "'false'",
    "early_stopping_patience": "5",
}
CONFIG_OPTIONS: dict[str, object] = {
    "data_paths": "$DATA_PATHS",
    "output_dir": "$OUTPUT_DIR",
    "tb_dir": "$TensorBoard_DIR",
    "pretrained_model_path": "$MODEL_NAME_OR_PATH",
    "model_type": "gpt_neox",
    "load_raw_dataset": True,
    "data_split": "98,2,0",
    "padding_mode": "padding",
    "use_dynamic_padding": True,
    "tokenize_mode": "sft",
    "tokenizer_type": "AutoTokenizer",
    "weighted_loss_mode": "case3",
    "attn_implementation": "flash_attention_2",
    "seq_length": 4096,
    "seed": 1234,
    "peft_type": None,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 5e-5,
    "min_lr": 5e-6,
    "weight_decay": 0.1,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "cosine",
    "num_warmup_steps": 300,
    "num_train_epochs": 4,
    "resume_from_checkpoint": None,
    "log_interval": 10,
    "checkpointing_steps": 100,
    "evaluation_steps": 100,
    "max_train_steps": None,
    "epoch_checkpointing": True,
    "shuffle_before_split": True,
    "early_stopping": True,
    "early_stopping_stall_num": 5,
    "saving_limit": 3,
}
LORA = {"peft_type": "lora", "quantization": None, "lora_rank": 96, "lora_alpha": 32, "lora_dropout": 0.05}
COBA = {"warmup_steps": 100, "history_length": 200, "tau": 5, "update_interval": 1, "sample_valid_num": 1}
KINDS: dict[str, dict[str, object]] = {
    "full": {},
    "lora": {**LORA, "saving_limit": None},
    "qlora": {**LORA, "peft_type": "qlora", "quantization": "4bit", "saving_limit": None},
    "coba": {"weighted_loss_mode": "coba", **{f"coba_{key}": value for key, value in COBA.items()}},
}


def script(*more: str, without: tuple[str, ...] = (), **changed: str) -> str:
    """A launch of ``run_gpt_mft_peft.sh``'s shape.

    Args:
        more: words after its options.
        without: options that it does not have.
        changed: values of others, as the shell has them.
    """
    options = {**SCRIPT_OPTIONS, **changed}
    lines = [f"    --{name} {value}".rstrip() for name, value in options.items() if name not in without]
    return SCRIPT_HEAD + " \\\n".join([*lines, *(f"    {word}" for word in more)]) + " 2>&1 | tee $OUTPUT/log.txt\n"


def config(kind: str = "full", **changed: object) -> str:
    """A ``*_train_config.json`` of a kind; a value of ``...`` takes the key away."""
    options = {**CONFIG_OPTIONS, **KINDS[kind], **changed}
    return json.dumps({name: value for name, value in options.items() if value is not ...}, indent=2)


def converted(directory: Path, text: str, *values: str, name: str | None = None, **known: str) -> Converted:
    """What a script or JSON file becomes."""
    file = directory / (name or ("lora_train_config.json" if text.startswith("{") else "run_gpt_mft_peft.sh"))
    file.write_text(text)
    return convert(file, values, known)


def keys(directory: Path, text: str, *values: str, **known: str) -> dict[str, object]:
    """The keys that it becomes."""
    return converted(directory, text, *values, **known).draft.values


def refusal(directory: Path, text: str, *values: str, name: str | None = None, **known: str) -> str:
    """Why it is refused, in one line."""
    with pytest.raises(UserError) as caught:
        converted(directory, text, *values, name=name, **known)
    assert "\n" not in str(caught.value)
    return str(caught.value)
