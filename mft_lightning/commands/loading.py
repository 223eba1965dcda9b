"""A checkpoint directory, full or LoRA, as a model with its tokenizer and chat format."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.tokenizer import load_tokenizer
from mft_lightning.errors import UserError, first_line
from mft_lightning.model.build import adapter_base, is_adapter
from mft_lightning.model.export import base_digest
from mft_lightning.training.checkpoint_dirs import METADATA, read_metadata

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadedModel:
    """A transformers or peft model in evaluation mode, with the encoder that trained it."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    chat_format: ChatFormat


def load_model(directory: Path, key: str, *, base: str | None = None, dtype: str = "auto") -> LoadedModel:
    """Load a checkpoint to ask it or to merge it.

    Args:
        directory: a full model or an adapter.
        key: the command-line key that named it, for messages.
        base: the adapter's base, in place of the one it names.
        dtype: of the weights in memory; ``auto`` as they are saved.

    Raises:
        UserError: the directory is no model, or its base is gone or is not the one the adapter was trained on.
    """
    if not directory.is_dir():
        raise UserError(f"{key} {directory}: is no directory. Give a checkpoint, like OUTPUT_DIR/step-00000100.")
    if not is_adapter(directory) and not (directory / "config.json").is_file():
        raise UserError(f"{key} {directory}: holds no model. Give a checkpoint, like OUTPUT_DIR/step-00000100.")
    metadata = read_metadata(directory) if (directory / METADATA).is_file() else None
    held: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    model: Any
    try:
        if is_adapter(directory):
            found = base if base is not None else _base_of(directory, key)
            model = AutoModelForCausalLM.from_pretrained(found, dtype=held)
            model = PeftModel.from_pretrained(model, str(directory), autocast_adapter_dtype=False)
        else:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=held)
    except (OSError, ValueError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{key} {directory}: cannot be loaded ({first_line(error)}).") from error
    tokenizer = load_tokenizer(str(directory))
    normalize = metadata is not None and metadata["chat_format"]["normalize_punctuation"]
    return LoadedModel(model.eval(), tokenizer, ChatFormat(tokenizer, normalize_punctuation=normalize))


def check_base(directory: Path, model: PeftModel, key: str) -> None:
    """Refuse a base that is not bit for bit the one the adapter was trained on, where the checkpoint says which.

    Raises:
        UserError: it is another.
    """
    if not (directory / METADATA).is_file():
        return
    trained_on = read_metadata(directory)["fingerprint"].get("frozen base (digest)")
    here = base_digest(model)
    if trained_on not in (None, here):
        raise UserError(
            f"{key}: is not the base that {directory} was trained on (digest {here}, trained on {trained_on}). "
            "Give the base of that run."
        )


def _base_of(directory: Path, key: str) -> str:
    """The base that an adapter names; of a moved run with a random base, the one that moved along."""
    named, beside = adapter_base(directory), directory.parent / "base"
    if not Path(named).is_absolute() or Path(named).is_dir():
        return named
    if Path(named).name == "base" and beside.is_dir():
        print(f"note: the adapter's base {named} is gone; using {beside}", file=sys.stderr)
        return str(beside)
    raise UserError(f"{key} {directory}: its adapter was trained on {named}, which is not there.")
