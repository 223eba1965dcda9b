"""Which checkpoints of an output directory stay, what stays of them, and where ``last`` and ``best`` point."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mft_lightning.aside import remove_directory, remove_unfinished, written_aside
from mft_lightning.errors import UserError
from mft_lightning.model.weight_files import OPTIMIZER_SHARDS
from mft_lightning.screen import say, shown
from mft_lightning.training.checkpoint_choice import find_best, find_checkpoints, look_through
from mft_lightning.training.checkpoint_dirs import (
    METADATA,
    TRAINER_STATE,
    CheckpointInfo,
    is_named,
    read_metadata,
    write_description,
)

SUPERSEDED = "superseded"
LAST, BEST = "last", "best"  # links beside the checkpoints


@dataclass(frozen=True)
class Retention:
    """What becomes of the checkpoints of a run; read from the directories, so that a resume remembers.

    Args:
        output_dir: where they are.
        limit: step checkpoints to keep; None keeps all.
        monitor: the metric that decides the best, if there is one.
        mode: whether less or more of it is better.
        trainer_state: of ``all`` kept ones, or of the ``latest`` alone.
    """

    output_dir: Path
    limit: int | None
    monitor: str | None
    mode: Literal["min", "max"]
    trainer_state: Literal["all", "latest"] = "all"
    _told: set[str] = field(default_factory=set)  # notes, each of which is said once

    def begin(self, step: int) -> None:
        """Clear what a killed process left, and move aside the checkpoints of steps after ``step``, taken again now."""
        self._clear()
        for directory in self.output_dir.glob("step-*"):
            if directory.is_dir() and is_named(directory) and int(directory.name.removeprefix("step-")) > step:
                supersede(directory)
        self.point()

    def settle(self) -> None:
        """Do what a process that was killed after a save had still to do."""
        self._clear()
        self.apply()

    def _clear(self) -> None:
        remove_unfinished(self.output_dir)
        for directory in self.output_dir.glob("step-*"):
            remove_unfinished(directory)

    def apply(self) -> None:
        """After a checkpoint was put in place: move the links, then drop what is no longer to be kept."""
        self.point()
        checkpoints = find_checkpoints(self.output_dir)
        gone = expired(checkpoints, self.limit, self.monitor, self.mode)
        if self.trainer_state == "latest":
            for info in checkpoints[:-1]:
                if info not in gone:
                    _drop_trainer_state(info.path)
        for info in gone:
            self._remove(info.path)

    def best(self, checkpoints: list[CheckpointInfo]) -> CheckpointInfo | None:
        return find_best(checkpoints, self.monitor, self.mode) if self.monitor else None

    def point(self) -> None:
        """Let ``last`` and ``best`` point to what they mean."""
        checkpoints = look_through(self.output_dir).whole
        for name, info in ((LAST, checkpoints[-1] if checkpoints else None), (BEST, self.best(checkpoints))):
            link = self.output_dir / name
            if link.exists() and not link.is_symlink():
                self._tell(f"note: {shown(link)} is none of this run's, and is left as it is.")
            elif info is None:
                link.unlink(missing_ok=True)
            elif not link.is_symlink() or link.readlink() != Path(info.path.name):
                try:
                    with written_aside(link) as aside:
                        aside.symlink_to(info.path.name)
                except OSError as error:
                    self._tell(f"note: {shown(link)} cannot be made ({error}); --ckpt_path {name} works without it.")

    def _tell(self, note: str) -> None:
        if note not in self._told:
            self._told.add(note)
            say(note)

    def _remove(self, directory: Path) -> None:
        """A file that another program holds open must not end a run; what is left goes with a later one."""
        try:
            remove_unfinished(self.output_dir, "step-*")
            remove_directory(directory)
        except OSError as error:
            self._tell(f"note: {shown(directory)} could not be removed ({error}).")


def supersede(directory: Path) -> None:
    """Move aside what is made again now; an earlier one of that name goes.

    Raises:
        UserError: something is in the way.
    """
    target = directory.parent / SUPERSEDED / directory.name
    try:
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            remove_directory(target)
        directory.rename(target)
    except OSError as error:
        raise UserError(f"{shown(directory)}: cannot be moved to {shown(target.parent)} ({error}).") from error


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


def _drop_trainer_state(directory: Path) -> None:
    """First from what the checkpoint says it consists of, then from the disk."""
    metadata = read_metadata(directory)
    parts = [name for name in metadata["files"] if name == TRAINER_STATE or name.startswith(OPTIMIZER_SHARDS)]
    for name in parts:
        del metadata["files"][name]
    if parts:
        with written_aside(directory / METADATA) as aside:
            write_description(aside, metadata)
    for name in parts:
        (directory / name).unlink(missing_ok=True)
