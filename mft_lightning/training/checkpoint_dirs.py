"""The checkpoints of an output directory, read from what each says of itself in ``checkpoint.json``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mft_lightning.errors import UserError

METADATA, TRAINER_STATE = "checkpoint.json", "trainer.pt"
FORMAT_VERSION = 1
FIELDS = {"step": int, "epoch_end": bool, "metrics": dict, "fingerprint": dict, "chat_format": dict}


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint directory: ``step-00000500`` holds the model after 500 optimizer steps.

    Attributes:
        path: the directory.
        step: optimizer steps done.
        epoch_end: saved for an epoch's end, never rotated.
        metrics: of the validation at this very step; empty where there was none.
    """

    path: Path
    step: int
    epoch_end: bool = False
    metrics: dict[str, float] = field(default_factory=dict)


def directory_name(step: int) -> str:
    return f"step-{step:08d}"


def read_metadata(directory: Path) -> dict[str, Any]:
    """``checkpoint.json`` of a checkpoint.

    Raises:
        UserError: it is missing, damaged or of a format this version does not know.
    """
    file = directory / METADATA
    try:
        metadata = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: is no checkpoint ({METADATA}: {error}).") from error
    if not isinstance(metadata, dict):
        raise UserError(f"{file}: is no checkpoint's description.")
    if metadata.get("format") != FORMAT_VERSION:
        raise UserError(
            f"{file}: format {metadata.get('format')!r} is not {FORMAT_VERSION}, the one this version reads."
        )
    wrong = [key for key, kind in FIELDS.items() if not isinstance(metadata.get(key), kind)]
    if wrong:
        raise UserError(f"{file}: is damaged ({', '.join(wrong)}).")
    return metadata


def read_checkpoint(directory: Path) -> CheckpointInfo:
    """What a checkpoint directory says of itself; raises as :func:`read_metadata` does."""
    metadata = read_metadata(directory)
    return CheckpointInfo(directory, metadata["step"], metadata["epoch_end"], metadata["metrics"])


def find_checkpoints(output_dir: Path) -> list[CheckpointInfo]:
    """All checkpoints of a run, by step; what else one keeps beside them under such a name is not looked at."""
    directories = [file.parent for file in output_dir.glob(f"step-*/{METADATA}")]
    found = [read_checkpoint(path) for path in directories if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda info: info.step)


def find_best(checkpoints: list[CheckpointInfo], monitor: str, mode: Literal["min", "max"]) -> CheckpointInfo | None:
    """The checkpoint with the best ``monitor``, the earlier of equals; None where none was validated."""
    sign = 1 if mode == "min" else -1
    validated = [info for info in checkpoints if math.isfinite(info.metrics.get(monitor, math.nan))]
    return min(validated, key=lambda info: (sign * info.metrics[monitor], info.step), default=None)


def expired(
    checkpoints: list[CheckpointInfo], limit: int | None, monitor: str | None, mode: Literal["min", "max"]
) -> list[CheckpointInfo]:
    """The step checkpoints beyond ``limit``: kept are the latest, the best, then the most recent ones.

    Checkpoints of an epoch's end are kept without counting.
    """
    if limit is None:
        return []
    rotating = [info for info in checkpoints if not info.epoch_end]
    by_recency = sorted(rotating, key=lambda info: -info.step)
    best = find_best(checkpoints, monitor, mode) if monitor else None
    if best in rotating and limit > 1:
        by_recency.remove(best)
        by_recency.insert(1 if by_recency and by_recency[0].step > best.step else 0, best)
    return by_recency[limit:]


def check_same_run(directory: Path, now: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint whose run was made from something else.

    Args:
        directory: the checkpoint.
        now: what decides this run, by key; only these are compared with what the checkpoint has of them.

    Raises:
        UserError: naming each key that differs, and its two values.
    """
    saved = read_metadata(directory)["fingerprint"]
    if changed := [key for key in now if saved.get(key) != now[key]]:
        what = "; ".join(f"{key} was {saved.get(key)!r}, is {now[key]!r}" for key in changed)
        raise UserError(f"--ckpt_path: {directory.name} belongs to another run: {what}. Set them back.")


def resolve_checkpoint(
    ckpt_path: str, output_dir: Path, monitor: str, mode: Literal["min", "max"]
) -> CheckpointInfo | None:
    """The checkpoint that ``--ckpt_path`` names: a directory, ``best``, or ``last``.

    Returns:
        None for ``last`` in a directory that holds no checkpoint: the run starts at step 0.

    Raises:
        UserError: no such checkpoint.
    """
    if ckpt_path == "last":
        checkpoints = find_checkpoints(output_dir)
        return checkpoints[-1] if checkpoints else None
    if ckpt_path == "best":
        best = find_best(find_checkpoints(output_dir), monitor, mode)
        if best is None:
            raise UserError(f"--ckpt_path best: no checkpoint in {output_dir} has been validated by {monitor}.")
        return best
    directory = Path(ckpt_path).expanduser()
    if not directory.is_dir():
        raise UserError(f"--ckpt_path {ckpt_path}: is no directory. Give last, best or a checkpoint directory.")
    return read_checkpoint(directory.resolve())
