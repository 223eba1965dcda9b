"""``merge``: an adapter and its base as one ordinary model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mft_lightning.aside import written_aside
from mft_lightning.bars import WorkBar
from mft_lightning.commands.devices import check_device
from mft_lightning.commands.loading import (
    DTYPES,
    base_of,
    check_base,
    checked_metadata,
    load_model,
    tell_unchecked,
    trained_on,
)
from mft_lightning.commands.logit_difference import PROMPTS, logit_difference
from mft_lightning.data.tokenizer import has_tokenizer, save_tokenizer, saved_tokenizer
from mft_lightning.errors import UserError, first_line
from mft_lightning.key_errors import parse
from mft_lightning.model.base import base_digest
from mft_lightning.model.export import adapter_dtype, save_base
from mft_lightning.model.generation_file import saved_generation_config
from mft_lightning.model.merging import MergedWeights, read_base
from mft_lightning.model.quantized import DequantizedWeights, require_bitsandbytes, settings_of
from mft_lightning.model.saved_adapter import is_adapter, saved_whole
from mft_lightning.model.settings import QLoraSettings
from mft_lightning.model.weights import Weights
from mft_lightning.paths import given_path
from mft_lightning.quiet import quieten
from mft_lightning.training.checkpoint_dirs import write_metadata
from mft_lightning.training.run_lock import only_run_in

INTO = ("base", QUANTIZED := "quantized-base")
MADE_OF = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin", ".md")  # the files of a model directory


def merge(argv: list[str]) -> None:
    """Write base + adapter as a Hugging Face model directory, with the tokenizer and its chat template."""
    quieten()
    options = _options(argv)
    adapter, output = given_path(options.adapter, "--adapter"), given_path(options.output, "--output")
    if not options.overwrite and (output.exists() or output.is_symlink()):
        raise UserError(f"--output {output}: is there already. Give a new directory, or --overwrite.")
    metadata = checked_metadata(adapter, "--adapter")
    if not is_adapter(adapter):
        raise UserError(f"--adapter {adapter}: holds no adapter; a full checkpoint is a whole model as it is.")
    path, where = base_of(adapter, "--adapter", options.base)
    if output.exists() or output.is_symlink():
        output = _replaceable(output, {f"--adapter {adapter}": adapter, where: Path(path)})
    lock = output.with_name(f".{output.name}.merging")
    try:
        with only_run_in(lock, "--output"):
            _merge(options, adapter, output, metadata, path, where)
    finally:
        with suppress(OSError):  # what a killed process left; not there, or another's at work
            lock.rmdir()


def _merge(
    options: Namespace, adapter: Path, output: Path, metadata: dict[str, Any] | None, path: str, where: str
) -> None:
    """Merge and tell.

    Args:
        options: of the command line.
        adapter: the directory.
        output: the directory, which is not there or may be replaced.
        metadata: of the adapter.
        path: the base, a directory or hub id.
        where: what messages call the base.
    """
    quantization = _quantization(options, metadata)
    base = read_base(path, None if metadata is None else getattr(torch, adapter_dtype(adapter)), where)
    into: Weights = base
    if options.merge_into == QUANTIZED and quantization is not None:
        into = DequantizedWeights(base, quantization, saved_whole(adapter))
    dtype = base.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    device = torch.device(options.device)
    merged = MergedWeights(adapter, into, dtype, device, f"--adapter {adapter}")
    tokenizer = _tokenizer(adapter, path, where)
    if metadata is not None and tokenizer is not None:
        merged.model.config.eos_token_id = tokenizer.eos_token_id
    own = saved_generation_config(str(adapter), f"--adapter {adapter}")
    merged.model.generation_config = own or saved_generation_config(path, where) or merged.model.generation_config
    _check_base(base, metadata, where, adapter)
    if merged.model.config.tie_word_embeddings != base.model.config.tie_word_embeddings:
        print("note: the adapter parts the embeddings from the head; the merged model has both.", file=sys.stderr)
    _write(output, merged, tokenizer, metadata, replace=options.overwrite)
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    print(f"merged model: {output} ({str(dtype).removeprefix('torch.')}, {size / 1e6:,.1f} MB)")
    if quantization is not None:
        _tell_difference(adapter, options.base, output, device)


def _options(argv: list[str]) -> Namespace:
    parser = ArgumentParser(prog="python -m mft_lightning merge", exit_on_error=False)
    parser.add_argument("--adapter", type=str, required=True, help="Checkpoint of a LoRA run, or any LoRA adapter.")
    parser.add_argument("--output", type=str, required=True, help="The new directory.")
    parser.add_argument("--base", type=str, help="Base model. Default: the one the adapter names.")
    parser.add_argument(
        "--dtype",
        type=str,
        default="auto",
        help=f"Of the merged weights: {', '.join(DTYPES)}. auto: as trained. They are computed in float32.",
    )
    parser.add_argument(
        "--merge-into",
        type=str,
        default=INTO[0],
        help=f"Of a QLoRA run's base, {INTO[0]}: as it was before it was quantised; {INTO[1]}: as it was trained on.",
    )
    parser.add_argument("--device", type=str, default="cpu", help="That computes: cpu, cuda.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a model directory that is there.")
    options = parse(parser, argv)
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype: {options.dtype!r} is none of {', '.join(DTYPES)}.")
    if options.merge_into not in INTO:
        raise UserError(f"--merge-into: {options.merge_into!r} is none of {', '.join(INTO)}.")
    check_device(options.device)
    return options


def _quantization(options: Namespace, metadata: dict[str, Any] | None) -> QLoraSettings | None:
    """How the adapter's base was quantised, if it was.

    Raises:
        UserError: it was not, or cannot be here, and is to be merged into.
    """
    settings = None if metadata is None else settings_of(metadata["fingerprint"])
    if options.merge_into == QUANTIZED:
        if settings is None:
            raise UserError(
                f"--merge-into {QUANTIZED}: {options.adapter} does not say that it was trained on one. Leave it out."
            )
        require_bitsandbytes(f"--merge-into {QUANTIZED}")
    return settings


def _replaceable(output: Path, inputs: Mapping[str, Path]) -> Path:
    """A directory that may be replaced, by its full name: empty, or a model, and not what the model is made from.

    Args:
        output: the directory that is there.
        inputs: directories to be read, by what messages call them.
    """
    there = output.resolve()
    for name, path in inputs.items():
        if any(part.resolve().is_relative_to(there) for part in (path, *path.rglob("*"))):  # a part may be a link
            raise UserError(f"--output {output}: holds what is merged ({name}). Give another directory.")
    entries = sorted(output.iterdir()) if output.is_dir() and not output.is_symlink() else None
    if entries is None or (entries and not (output / "config.json").is_file()):
        raise UserError(f"--overwrite: {output} is no model directory. Give another --output, or remove it yourself.")
    for entry in entries:
        if entry.is_symlink():
            raise UserError(
                f"--overwrite: {output} holds {entry.name}, which is a link. Give another --output, or remove it "
                "yourself."
            )
        if not entry.is_file() or entry.suffix not in MADE_OF:
            raise UserError(
                f"--overwrite: {output} holds {entry.name}, which is no part of a model. Give another --output, or "
                "remove it yourself."
            )
    return there


def _check_base(base: Weights, metadata: dict[str, Any] | None, where: str, adapter: Path) -> None:
    """Refuse another base than the adapter's, told by its digest."""
    if trained_on(metadata) is None:
        tell_unchecked(adapter, where)
        return
    with WorkBar("checking the base", _bytes(base), "tensors") as bar:
        here = base_digest(Watched(base, bar))
    check_base(here, adapter, metadata, where)


def _write(
    output: Path,
    merged: MergedWeights,
    tokenizer: PreTrainedTokenizerBase | None,
    metadata: dict[str, Any] | None,
    *,
    replace: bool,
) -> None:
    """Write the directory, whole or not at all."""
    try:
        with written_aside(output, replace_directory=replace) as aside:
            aside.mkdir()
            with WorkBar("merging", _bytes(merged), "tensors") as bar:
                save_base(merged.model, Watched(merged, bar), aside)
            if tokenizer is not None:
                save_tokenizer(tokenizer, aside)
            if metadata is not None:  # how it was trained; it holds what the prompt's encoder needs to know
                write_metadata(aside, metadata)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--output {output}: cannot be written ({first_line(error)}).") from error


def _tell_difference(adapter: Path, base: str | None, output: Path, device: torch.device) -> None:
    """Measure how far the merged model is from the adapter on its quantised base, where that can be made here."""
    try:
        require_bitsandbytes("how far it is from the quantised base + adapter was not measured")
    except UserError as error:
        print(f"note: {error}", file=sys.stderr)
        return
    found = logit_difference(
        lambda: load_model(adapter, "--adapter", base=base), lambda: load_model(output, "--output"), device
    )
    print(
        f"its logits are {found.largest:.2g} at most and {found.mean:.2g} on average from those of the quantised base "
        f"+ adapter, at {found.positions} positions of {len(PROMPTS)} prompts"
    )


def _tokenizer(adapter: Path, base: str, where: str) -> PreTrainedTokenizerBase | None:
    """The adapter's tokenizer, or else its base's, as it is."""
    if has_tokenizer(str(adapter)):
        return saved_tokenizer(str(adapter), f"--adapter {adapter}")
    if has_tokenizer(base):
        return saved_tokenizer(base, where)
    print(f"note: the merged model has no tokenizer: neither the adapter has one nor {base}.", file=sys.stderr)
    return None


def _bytes(weights: Weights) -> int:
    state = weights.model.state_dict()
    return sum(state[name].nbytes for name in weights)


class Watched(Mapping[str, Tensor]):
    """Weights that tell a bar of each that is asked for."""

    def __init__(self, weights: Weights, bar: WorkBar) -> None:
        self.weights, self.bar, self.done = weights, bar, 0

    def __getitem__(self, name: str) -> Tensor:
        value = self.weights[name]
        self.done += value.nbytes
        self.bar.reach(self.done, 1)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)
