"""``merge``: an adapter and its base as one ordinary model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from mft_lightning.aside import written_aside
from mft_lightning.commands.loading import DTYPES, load_model
from mft_lightning.data.tokenizer import save_tokenizer
from mft_lightning.errors import UserError
from mft_lightning.key_errors import parse
from mft_lightning.model.build import is_adapter
from mft_lightning.model.export import save_causal_lm
from mft_lightning.quiet import quieten
from mft_lightning.training.checkpoint_dirs import METADATA, read_metadata, write_metadata


def merge(argv: list[str]) -> None:
    """Write base + adapter as a Hugging Face model directory, with the tokenizer and its chat template."""
    quieten()
    parser = ArgumentParser(prog="python -m mft_lightning merge", exit_on_error=False)
    parser.add_argument("--adapter", type=str, required=True, help="Checkpoint of a LoRA run.")
    parser.add_argument("--output", type=str, required=True, help="The new directory.")
    parser.add_argument("--base", type=str, help="Base model. Default: the one the adapter names.")
    parser.add_argument(
        "--dtype", type=str, default="auto", help=f"Of the merged weights: {', '.join(DTYPES)}. auto: as trained."
    )
    options = parse(parser, argv)
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype: {options.dtype!r} is none of {', '.join(DTYPES)}.")
    adapter, output = Path(options.adapter).expanduser(), Path(options.output).expanduser()
    if output.exists():
        raise UserError(f"--output {output}: is there already. Give a new directory.")
    if (adapter / "config.json").is_file() and not is_adapter(adapter):
        raise UserError(f"--adapter {adapter}: holds no adapter; a full checkpoint is a whole model as it is.")
    loaded = load_model(adapter, "--adapter", base=options.base)
    merged: Any = loaded.model.merge_and_unload()
    if options.dtype != "auto":
        merged = merged.to(getattr(torch, options.dtype))
    try:
        with written_aside(output) as aside:
            aside.mkdir()
            save_causal_lm(merged, merged.state_dict(), aside)
            save_tokenizer(loaded.tokenizer, aside)
            if (adapter / METADATA).is_file():  # how it was trained; it holds what the prompt's encoder needs to know
                write_metadata(aside, read_metadata(adapter))
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error}).") from error
    print(f"merged model: {output} ({str(merged.dtype).removeprefix('torch.')})")
