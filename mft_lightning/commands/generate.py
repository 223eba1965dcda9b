"""``generate``: ask a checkpoint, full or LoRA, through the encoder that trained it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.records import Turn
from mft_lightning.data.tokenizer import load_tokenizer
from mft_lightning.errors import UserError, first_line
from mft_lightning.model.build import adapter_base, is_adapter
from mft_lightning.quiet import quieten
from mft_lightning.training.checkpoint_dirs import METADATA, read_metadata


def generate(argv: list[str]) -> None:
    """Print the answer to ``--prompt`` and nothing else on stdout."""
    quieten()
    parser = ArgumentParser(prog="python -m mft_lightning generate", exit_on_error=False)
    parser.add_argument("--model", type=str, required=True, help="Checkpoint directory, full or LoRA.")
    parser.add_argument("--prompt", type=str, required=True, help="What the human says.")
    parser.add_argument("--system", type=str | None, default=None, help="A system turn in front.")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="Most tokens of the answer.")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token; above, samples.")
    parser.add_argument("--top_p", type=float, default=1.0, help="Sample among the likeliest tokens of this mass.")
    parser.add_argument("--top_k", type=int, default=0, help="Sample among so many tokens; 0: all.")
    parser.add_argument("--seed", type=int, default=42, help="Of the sampling.")
    parser.add_argument("--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu")
    try:
        options = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if options.temperature < 0 or not 0 < options.top_p <= 1 or options.top_k < 0 or options.max_new_tokens < 1:
        raise UserError("generate: temperature and top_k are at least 0, top_p in (0, 1], max_new_tokens at least 1.")
    directory = Path(options.model).expanduser()
    model, tokenizer, chat_format = load_for_generation(directory)
    turns = [Turn("system", options.system)] if options.system is not None else []
    sampling = {"do_sample": False}
    if options.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
        }
    torch.manual_seed(options.seed)
    ids = torch.tensor([chat_format.encode_prompt([*turns, Turn("human", options.prompt)])])
    try:
        model = model.to(options.device)
    except RuntimeError as error:
        raise UserError(f"--device {options.device}: {first_line(error)}") from error
    output = model.generate(
        input_ids=ids.to(options.device),
        attention_mask=torch.ones_like(ids).to(options.device),
        max_new_tokens=options.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    print(chat_format.decode(output[0, ids.shape[1] :].tolist(), skip_special_tokens=True))


def _base_of(directory: Path) -> str:
    """The base that an adapter names; of a moved run with a random base, the one that moved along."""
    named, beside = adapter_base(directory), directory.parent / "base"
    if not Path(named).is_absolute() or Path(named).is_dir():
        return named
    if Path(named).name == "base" and beside.is_dir():
        print(f"note: the adapter's base {named} is gone; using {beside}", file=sys.stderr)
        return str(beside)
    raise UserError(f"--model {directory}: its adapter was trained on {named}, which is not there.")


def load_for_generation(directory: Path) -> tuple[Any, PreTrainedTokenizerBase, ChatFormat]:
    """Model (transformers' or peft's), tokenizer and chat format of a checkpoint, ready to answer.

    Raises:
        UserError: the directory is no model, or the base that its adapter names is gone.
    """
    if not directory.is_dir():
        raise UserError(f"--model {directory}: is no directory. Give a checkpoint, like OUTPUT_DIR/step-00000100.")
    if not is_adapter(directory) and not (directory / "config.json").is_file():
        raise UserError(f"--model {directory}: holds no model. Give a checkpoint, like OUTPUT_DIR/step-00000100.")
    model: Any
    try:
        if is_adapter(directory):
            base = _base_of(directory)
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), directory)
        else:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    except (OSError, ValueError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"--model {directory}: cannot be loaded ({first_line(error)}).") from error
    tokenizer = load_tokenizer(str(directory))
    normalize = False
    if (directory / METADATA).is_file():
        normalize = read_metadata(directory)["chat_format"]["normalize_punctuation"]
    return model.eval(), tokenizer, ChatFormat(tokenizer, normalize_punctuation=normalize)
