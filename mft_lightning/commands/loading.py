"""A checkpoint directory, full or LoRA, as a model with its tokenizer and chat format."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, cached_file

from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.tokenizer import has_tokenizer, load_tokenizer
from mft_lightning.errors import UserError, first_line
from mft_lightning.model.base import base_digest, base_state
from mft_lightning.model.buffers import unsaved_buffers_kept
from mft_lightning.model.export import adapter_dtype
from mft_lightning.model.quantized import quantized_causal_lm, settings_of
from mft_lightning.model.saved_adapter import adapter_base, is_adapter, peft_config, saved_whole
from mft_lightning.model.weight_files import MODEL_SHARDS, UNREADABLE, open_adapter, why_unreadable
from mft_lightning.model.whole_modules import make_room
from mft_lightning.paths import given_path
from mft_lightning.training.checkpoint_dirs import METADATA, read_metadata, verify_model

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadedModel:
    """A transformers or peft model in evaluation mode, with the encoder that trained it."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    chat_format: ChatFormat


def load_model(directory: Path, key: str, *, base: str | None = None, dtype: str = "auto") -> LoadedModel:
    """Load a checkpoint to ask it.

    Args:
        directory: a full model or an adapter.
        key: the command-line key that named it, for messages.
        base: the adapter's base, in place of the one it names.
        dtype: of the weights in memory; ``auto`` as they are saved, an adapter's base as it was trained on. The base of
            a QLoRA checkpoint has the 4 or 8 bits that it was trained on, and this is of the rest.

    Raises:
        UserError: the directory is no model, or its base is gone or is not the one the adapter was trained on.
    """
    metadata = checked_metadata(directory, key)
    asked = str(directory)
    if is_adapter(directory):
        found, where = base_of(directory, key, base)
        model = _with_adapter(directory, key, found, where, metadata)
        if base is not None and trained_on(metadata) is None:
            tell_unchecked(directory, where)
        if not has_tokenizer(asked):
            asked = found
        with unsaved_buffers_kept(model):
            model = model if dtype == "auto" else model.to(getattr(torch, dtype))
    elif base is not None:
        raise UserError(f"--base {base}: is of an adapter, and {key} {directory} is a whole model. Leave it out.")
    else:
        model = _pretrained(directory, f"{key} {directory}", dtype)
    tokenizer = load_tokenizer(asked, where=f"{key} {directory}")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{key} {directory}: its tokenizer has no eos token, which ends an answer. Name one of its tokens as "
            "eos_token in its tokenizer_config.json."
        )
    normalize = metadata is not None and metadata["chat_format"]["normalize_punctuation"]
    return LoadedModel(model.eval(), tokenizer, ChatFormat(tokenizer, normalize_punctuation=normalize))


def checked_metadata(directory: Path, key: str) -> dict[str, Any] | None:
    """What ``checkpoint.json`` says of a full model or an adapter, once its files are known to be as written.

    Args:
        directory: the model or adapter.
        key: the command-line key that named it, for messages.

    Returns:
        None of a directory that comes from elsewhere.

    Raises:
        UserError: the directory is no model, or damaged, or a sharded checkpoint.
    """
    if not directory.is_dir():
        raise UserError(f"{key} {directory}: is no directory. Give a checkpoint, like OUTPUT_DIR/step-00000100.")
    if not is_adapter(directory) and not (directory / "config.json").is_file():
        raise UserError(f"{key} {directory}: holds no model. Give a checkpoint, like OUTPUT_DIR/step-00000100.")
    if (directory / MODEL_SHARDS).is_dir():
        raise UserError(
            f"{key} {directory}: is a sharded checkpoint. Make a model of it with python -m mft_lightning consolidate "
            f"--checkpoint {directory} --output DIR."
        )
    if not (directory / METADATA).is_file():
        return None
    verify_model(directory)
    return read_metadata(directory)


def _pretrained(path: Path | str, where: str, dtype: str) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto" if dtype == "auto" else getattr(torch, dtype))
    except UNREADABLE as error:
        raise UserError(f"{where}: cannot be loaded ({why_unreadable(error)}).") from error


def _with_adapter(directory: Path, key: str, base: str, where: str, metadata: dict[str, Any] | None) -> Any:
    """The adapter on its base, in the dtype it was trained in, if the base is bit for bit the one of that run.

    Args:
        directory: the adapter.
        key: the command-line key that named it, for messages.
        base: a directory or hub id.
        where: what messages call the base.
        metadata: of the adapter.
    """
    from peft import PeftModel  # here for the start-up time of asking a full model

    described = {} if metadata is None else metadata["fingerprint"]
    settings, kind = settings_of(described), adapter_dtype(directory)
    weights: Mapping[str, torch.Tensor] | None = None
    if settings is None:
        model = _pretrained(base, where, kind)
    else:
        model, weights = quantized_causal_lm(base, getattr(torch, kind), settings, where, saved_whole(directory))
    here = base_digest(base_state(model) if weights is None else weights)  # before it gets rows for embeddings
    try:
        make_room(model, open_adapter(directory))
        model = PeftModel.from_pretrained(
            model, str(directory), config=peft_config(directory), autocast_adapter_dtype=False
        )
    except (*UNREADABLE, TypeError) as error:
        raise UserError(f"{key} {directory}: cannot be put on its base ({why_unreadable(error)}).") from error
    check_base(here, directory, metadata, where)
    return model


def trained_on(metadata: dict[str, Any] | None) -> str | None:
    """The digest of the base that an adapter was trained on; None of one that does not tell it.

    Args:
        metadata: of the adapter.
    """
    found: str | None = None if metadata is None else metadata["fingerprint"].get("frozen base (digest)")
    return found


def check_base(digest: str, directory: Path, metadata: dict[str, Any] | None, where: str) -> None:
    """Refuse another base than the adapter's.

    Args:
        digest: of the base that is here.
        directory: the adapter.
        metadata: of the adapter.
        where: what messages call the base.

    Raises:
        UserError: it was trained on another.
    """
    if (expected := trained_on(metadata)) not in (None, digest):
        raise UserError(
            f"{where}: is not the base that {directory.resolve().name} was trained on (digest {digest}, trained on "
            f"{expected}). Give the base of that run."
        )


def tell_unchecked(directory: Path, where: str) -> None:
    """Say that an adapter does not tell its base from others.

    Args:
        directory: the adapter.
        where: what messages call the base.
    """
    print(f"note: {directory} does not tell its base from others; {where} was not checked.", file=sys.stderr)


def base_of(directory: Path, key: str, given: str | None = None) -> tuple[str, str]:
    """The base of an adapter: a directory or hub id, and what messages call it.

    Args:
        directory: of the adapter.
        key: the command-line key that named it, for messages.
        given: the base to take in place of the one it names.

    Raises:
        UserError: the adapter names none, or it is not there, nor on the hub.
    """
    if given == "":
        raise UserError("--base: names no base. Give a model directory or hub id.")
    found = _named_base(directory, key) if given is None else given
    where = f"{key} {directory}: its base {found}" if given is None else f"--base {found}"
    instead = " Say where it is with --base." if given is None else ""
    path = given_path(found, f"{key} {directory}: its base" if given is None else "--base")
    if found.startswith(("/", ".", "~")) and not path.is_dir():
        raise UserError(f"{where}: is no directory.{instead}")
    if not path.is_dir():
        try:
            cached_file(found, CONFIG_NAME)
        except OSError as error:
            why = first_line(error)
            raise UserError(
                f"{where}: there is no such directory here, and the hub does not give one ({why}).{instead}"
            ) from error
    return str(path) if found.startswith("~") else found, where


def _named_base(directory: Path, key: str) -> str:
    """The base that an adapter names; of a moved run with a random base, the one that moved along."""
    named, beside = adapter_base(directory), directory.resolve().parent / "base"
    if not isinstance(named, str) or not named:
        raise UserError(f"{key} {directory}: its adapter_config.json names no base. Give one with --base.")
    if not Path(named).is_absolute() or Path(named).is_dir():
        return named
    if Path(named).name == "base" and beside.is_dir():
        print(f"note: the adapter's base {named} is gone; using {beside}", file=sys.stderr)
        return str(beside)
    raise UserError(
        f"{key} {directory}: its adapter was trained on {named}, which is not there. Say where it is with --base."
    )
