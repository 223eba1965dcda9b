"""``generate``: ask a checkpoint, full or LoRA, through the encoder that trained it."""

from __future__ import annotations

import argparse
import json
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
from mft_lightning.errors import UserError
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
    directory = Path(options.model)
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
    model = model.to(options.device)
    output = model.generate(
        input_ids=ids.to(options.device),
        attention_mask=torch.ones_like(ids).to(options.device),
        max_new_tokens=options.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False))


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
            base = adapter_base(directory)
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), directory)
        else:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    except (OSError, ValueError, SafetensorError, json.JSONDecodeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"--model {directory}: cannot be loaded ({first}).") from error
    tokenizer = load_tokenizer(str(directory))
    normalize = False
    if (directory / METADATA).is_file():
        normalize = read_metadata(directory)["chat_format"]["normalize_punctuation"]
    return model.eval(), tokenizer, ChatFormat(tokenizer, normalize_punctuation=normalize)
