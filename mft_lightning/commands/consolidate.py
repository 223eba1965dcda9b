"""``consolidate``: a checkpoint whose parts are in several files as an ordinary Hugging Face directory."""

from __future__ import annotations

import shutil

import torch
from jsonargparse import ArgumentParser
from safetensors.torch import save_file

from mft_lightning.aside import written_aside
from mft_lightning.errors import UserError, first_line
from mft_lightning.key_errors import parse
from mft_lightning.model.export import ADAPTER_FILE, write_parts
from mft_lightning.model.saved_adapter import is_adapter
from mft_lightning.model.weight_files import MODEL_SHARDS, UNREADABLE, ShardFiles
from mft_lightning.paths import given_path
from mft_lightning.quiet import quieten
from mft_lightning.training.checkpoint_dirs import read_metadata, verify_weights, write_metadata


def consolidate(argv: list[str]) -> None:
    """Write the model of a sharded checkpoint, with its tokenizer; the optimizer's state stays behind."""
    quieten()
    parser = ArgumentParser(prog="python -m mft_lightning consolidate", exit_on_error=False)
    parser.add_argument("--checkpoint", type=str, required=True, help="Checkpoint of a run with checkpoint.sharded.")
    parser.add_argument("--output", type=str, required=True, help="The new directory.")
    options = parse(parser, argv)
    checkpoint, output = given_path(options.checkpoint, "--checkpoint"), given_path(options.output, "--output")
    if output.exists():
        raise UserError(f"--output {output}: is there already. Give a new directory.")
    if not (checkpoint / MODEL_SHARDS).is_dir():
        raise UserError(
            f"--checkpoint {checkpoint}: is no sharded checkpoint; any other is an ordinary model as it is."
        )
    verify_weights(checkpoint)
    metadata = read_metadata(checkpoint)
    try:
        files = ShardFiles(checkpoint / MODEL_SHARDS)
        with written_aside(output) as aside:
            aside.mkdir()
            for name in metadata["files"]:
                if "/" not in name and name.endswith((".json", ".jinja", ".txt", ".model")):
                    shutil.copy(checkpoint / name, aside / name)
            if is_adapter(checkpoint):
                save_file({name: files.read(name) for name in files.names()}, aside / ADAPTER_FILE, {"format": "pt"})
            else:
                shapes = {
                    name: torch.empty(files.shape(name), dtype=files.dtype(name), device="meta")
                    for name in files.names()
                }
                write_parts(shapes, files.read, aside)
            write_metadata(aside, metadata)
    except UNREADABLE as error:
        raise UserError(f"--output {output}: cannot be written ({first_line(error)}).") from error
    print(f"model: {output}")
