"""One checkpoint directory: what it says of itself in ``checkpoint.json``, and whether it is as it was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mft_lightning.errors import UserError
from mft_lightning.screen import shown

METADATA, TRAINER_STATE = "checkpoint.json", "trainer.pt"
FORMAT_VERSION = 3
FIELDS = {"step": int, "epoch_end": bool, "metrics": dict, "processes": int}
FIELDS |= dict.fromkeys(("fingerprint", "chat_format", "files"), dict)


class OtherFormatError(UserError):
    """A checkpoint of another version of this program, as whole as it may be."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint directory: ``step-00000500`` holds the model after 500 optimizer steps.

    Attributes:
        path: the directory.
        step: optimizer steps done.
        epoch_end: saved for an epoch's end, never rotated.
        metrics: of the validation at this very step; empty where there was none.
        resumable: whether the trainer's state is there too.
    """

    path: Path
    step: int
    epoch_end: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    resumable: bool = True


def directory_name(step: int) -> str:
    return f"step-{step:08d}"


def is_named(directory: Path) -> bool:
    """Whether a directory is called as a checkpoint is."""
    return directory.name.removeprefix("step-").isdigit() and directory.name.startswith("step-")


def write_metadata(directory: Path, metadata: dict[str, Any]) -> None:
    """Write ``checkpoint.json``, with the size and the SHA-256 of every file that is in ``directory`` by now.

    Args:
        directory: with everything else that belongs to the checkpoint.
        metadata: what else there is to say of it.
    """
    paths = [file for file in sorted(directory.rglob("*")) if file.is_file() and file != directory / METADATA]
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": _checksum(path)}
        for path in paths
    }
    write_description(directory / METADATA, {**metadata, "files": files})


def write_description(file: Path, metadata: dict[str, Any]) -> None:
    """``metadata`` with the checksum of its own words, as JSON for the eye."""
    said = {key: value for key, value in metadata.items() if key != "sha256"}
    file.write_text(json.dumps({**said, "sha256": _checksum_of(said)}, indent=2) + "\n", encoding="utf-8")


def read_metadata(directory: Path) -> dict[str, Any]:
    """``checkpoint.json`` of a checkpoint.

    Raises:
        OtherFormatError: its format is not the one this version reads.
        UserError: it is missing or damaged.
    """
    file = directory / METADATA
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(directory)}: is no checkpoint ({METADATA}: {error}).") from error
    if not isinstance(metadata, dict):
        raise UserError(f"{shown(file)}: is no checkpoint's description.")
    checksum = metadata.pop("sha256", None)
    if checksum not in (None, _checksum_of(metadata)):
        raise UserError(f"{shown(file)}: is damaged: it is not as it was written (SHA-256).")
    if (version := metadata.get("format")) != FORMAT_VERSION:
        raise OtherFormatError(
            f"{shown(file)}: format {version!r} is not {FORMAT_VERSION}, the one this version reads. Use the version "
            "of mft_lightning that wrote it."
        )
    wrong = [key for key, kind in FIELDS.items() if not isinstance(metadata.get(key), kind)]
    wrong += ["sha256"] if checksum is None else []
    if wrong:
        raise UserError(f"{shown(file)}: is damaged ({', '.join(wrong)}).")
    return metadata


def read_checkpoint(directory: Path) -> CheckpointInfo:
    """What a checkpoint directory says of itself, if all its files are there in their sizes.

    Raises:
        UserError: it is not whole, or as :func:`read_metadata` does.
    """
    metadata = read_metadata(directory)
    for name, written in metadata["files"].items():
        try:
            size = (directory / name).stat().st_size
        except OSError as error:  # or removed by another thread just now
            raise UserError(f"{shown(directory)}: is damaged: {name} is missing.") from error
        if size != written["bytes"]:
            raise UserError(f"{shown(directory)}: is damaged: {name} has {size:,} bytes of {written['bytes']:,}.")
    return CheckpointInfo(
        directory, metadata["step"], metadata["epoch_end"], metadata["metrics"], TRAINER_STATE in metadata["files"]
    )


def verify(directory: Path) -> CheckpointInfo:
    """:func:`read_checkpoint`, if every byte is the one that was written.

    Raises:
        UserError: naming the file that is not.
    """
    info = read_checkpoint(directory)
    _verify_files(directory, lambda name: True)
    return info


def verify_weights(directory: Path) -> None:
    """Raise :class:`UserError` if the weights are not those that were written."""
    _verify_files(directory, lambda name: name.endswith(".safetensors"))


def verify_model(directory: Path) -> None:
    """Raise :class:`UserError` if the weights, the tokenizer or the configuration are not those that were written.

    An adapter's configuration is for the user to edit: it says where the base is. The trainer's state is no part of the
    model, and may be gone.
    """
    _verify_files(directory, lambda name: name not in (TRAINER_STATE, "adapter_config.json"))


def _verify_files(directory: Path, is_meant: Callable[[str], bool]) -> None:
    for name, written in read_metadata(directory)["files"].items():
        if not is_meant(name):
            continue
        try:
            found = _checksum(directory / name)
        except OSError as error:
            raise UserError(f"{shown(directory)}: is damaged: {error}.") from error
        if found != written["sha256"]:
            raise UserError(f"{shown(directory)}: is damaged: {name} is not as it was written (SHA-256).")


def _checksum(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _checksum_of(metadata: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
