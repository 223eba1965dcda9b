"""The checkpoints of an output directory: the latest, the best, and the one that ``--ckpt_path`` means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mft_lightning.errors import UserError
from mft_lightning.paths import given_path
from mft_lightning.screen import say, shown
from mft_lightning.training.checkpoint_dirs import (
    CheckpointInfo,
    OtherFormatError,
    is_named,
    read_checkpoint,
    verify,
)

STATE_DROPPED = "its trainer state was dropped (checkpoint.trainer_state: latest), so a run cannot go on from it."


@dataclass(frozen=True)
class Checkpoints:
    """What is called like a checkpoint in an output directory, by step.

    Attributes:
        whole: those that have all their files, in their sizes.
        damaged: those that have not, each with what is wrong with it.
        foreign: those of another version of this program, each with what to say of it.
    """

    whole: list[CheckpointInfo]
    damaged: dict[Path, str]
    foreign: dict[Path, str]


def look_through(output_dir: Path) -> Checkpoints:
    """All checkpoints of a run; what else one keeps beside them is not looked at."""
    whole, damaged, foreign = [], {}, {}
    for directory in sorted(path for path in output_dir.glob("step-*") if path.is_dir() and is_named(path)):
        try:
            whole.append(read_checkpoint(directory))
        except OtherFormatError as error:
            foreign[directory] = str(error)
        except UserError as error:
            damaged[directory] = str(error)
    return Checkpoints(sorted(whole, key=lambda info: info.step), damaged, foreign)


def find_checkpoints(output_dir: Path) -> list[CheckpointInfo]:
    """The whole ones, by step."""
    return look_through(output_dir).whole


def find_best(checkpoints: list[CheckpointInfo], monitor: str, mode: Literal["min", "max"]) -> CheckpointInfo | None:
    """The checkpoint with the best ``monitor``, the earlier of equals; None where none was validated."""
    sign = 1 if mode == "min" else -1
    validated = [info for info in checkpoints if math.isfinite(info.metrics.get(monitor, math.nan))]
    return min(validated, key=lambda info: (sign * info.metrics[monitor], info.step), default=None)


def resolve_checkpoint(
    ckpt_path: str, output_dir: Path, monitor: str, mode: Literal["min", "max"], *, to_resume: bool = False
) -> CheckpointInfo | None:
    """The checkpoint that ``--ckpt_path`` names: a directory, ``best``, or ``last``. Every byte of it is checked.

    ``last`` passes over checkpoints that are not whole, and says so.

    Args:
        ckpt_path: what was asked for.
        output_dir: of the run.
        monitor: the metric that decides the best.
        mode: whether less or more of it is better.
        to_resume: whether the trainer's state is needed too.

    Returns:
        None for ``last`` in a directory that holds no checkpoint: the run starts at step 0.

    Raises:
        UserError: no such checkpoint, or one that is not as it was written.
    """
    found = look_through(output_dir)
    if ckpt_path in ("last", "best") and found.foreign:
        raise OtherFormatError(next(iter(found.foreign.values())))
    if ckpt_path == "last":
        return _newest_whole(found, output_dir, to_resume)
    if ckpt_path == "best":
        best = find_best(found.whole, monitor, mode)
        if best is None:
            raise UserError(f"--ckpt_path best: no checkpoint in {output_dir} has been validated by {monitor}.")
        _tell_passed_over(list(found.damaged.values()), best)
        return _checked(best.path, to_resume)
    directory = given_path(ckpt_path, "--ckpt_path")
    if not directory.is_dir():
        raise UserError(f"--ckpt_path {ckpt_path}: is no directory. Give last, best or a checkpoint directory.")
    return _checked(directory.resolve(), to_resume)


def _newest_whole(found: Checkpoints, output_dir: Path, to_resume: bool) -> CheckpointInfo | None:
    faults = dict(found.damaged)
    chosen = None
    for info in reversed(found.whole):
        try:
            chosen = _checked(info.path, to_resume)
            break
        except UserError as error:
            faults[info.path] = str(error)
    newer = [fault for path, fault in sorted(faults.items()) if chosen is None or path.name > chosen.path.name]
    if chosen is None and newer:
        raise UserError("\n".join([f"--ckpt_path last: no checkpoint in {shown(output_dir)} is whole.", *newer]))
    if chosen is not None:
        _tell_passed_over(newer, chosen)
    return chosen


def _tell_passed_over(faults: list[str], chosen: CheckpointInfo) -> None:
    say(*(f"note: {fault} Passed over for {chosen.path.name}." for fault in faults))


def _checked(directory: Path, to_resume: bool) -> CheckpointInfo:
    info = verify(directory)
    if to_resume and not info.resumable:
        raise UserError(f"{shown(directory)}: {STATE_DROPPED} Use --ckpt_path last.")
    return info
