"""The data files of a task directory."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from mft_lightning.data.tasks import Task
from mft_lightning.errors import UserError
from mft_lightning.paths import nearest_beside

LOOKED_AT = 1000  # files in a directory that is no data file, before it is taken for none of ours
_DATA_FILE = re.compile(r"(?P<plain>[^.].*\.jsonl)(\.gz|\.zst)?", re.DOTALL)
_LIKE_DATA = re.compile(r"[^.].*\.(json|jsonl|jsonlines|ndjson)([^a-z0-9].*)?", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class TaskFiles:
    """What a task directory holds, without names that start with a dot.

    Attributes:
        data: the files that are read, by name.
        unread: names that look like data too, of files and of directories with such files.
    """

    data: list[Path]
    unread: list[str]


def find_files(task: Task) -> TaskFiles:
    """The data files of a task.

    Raises:
        UserError: the directory cannot be listed or holds no data file, a data file is none (a link that leads
            nowhere, a directory), or one name stands there both plain and compressed.
    """
    try:
        names = sorted(path.name for path in task.directory.iterdir())
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{task.key}: {task.directory} is not a directory that can be read ({why}). "
            f"Give the task's directory of *.jsonl files.{nearest_beside(task.directory)}"
        ) from error
    files: dict[str, Path] = {}
    unread = []
    for name in names:
        match, path = _DATA_FILE.fullmatch(name), task.directory / name
        if match is None:
            if _LIKE_DATA.fullmatch(name) or _holds_data(path):
                unread.append(name)
            continue
        plain = match["plain"]
        _refuse_no_file(path)
        if plain in files:
            raise UserError(
                f"{task.directory}: {files[plain].name} and {name} have one name, as the same data would have twice. "
                "Take one away, or rename it."
            )
        files[plain] = path
    if not files:
        found = ", ".join(names[:5]) or "nothing"
        hint = " convert-data makes such files of JSON arrays and of other programs' data." if unread else ""
        raise UserError(f"{task.key}: no *.jsonl file in {task.directory} (it holds {found}).{hint}")
    return TaskFiles(list(files.values()), unread)


def check_files(tasks: Iterable[Task]) -> None:
    """Look at the files of all tasks, those to train on and those to validate on, before the first is read.

    Raises:
        UserError: what :func:`find_files` raises, or a file that is there twice, through a link: its conversations
            would be trained on twice, or evaluated on after they were trained on.
    """
    known: dict[tuple[int, int], Path] = {}
    for task in tasks:
        for path in find_files(task).data:
            status = path.stat()
            other = known.setdefault((status.st_dev, status.st_ino), path)
            if other != path and status.st_ino:
                raise UserError(f"{path}: is the same file as {other}, by a link. Take one of the two away.")


def _holds_data(path: Path) -> bool:
    """Whether this is a directory that is not hidden and has files that look like data, at any depth."""
    if path.name.startswith("."):
        return False
    try:
        return any(_LIKE_DATA.fullmatch(inner.name) for inner in islice(path.rglob("*"), LOOKED_AT))
    except OSError:  # no directory, or one that is nobody's business
        return False


def _refuse_no_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
        why = "" if S_ISREG(mode) else "a directory" if S_ISDIR(mode) else "a pipe or a device"
    except OSError as error:
        why = f"{'a link: ' if path.is_symlink() else ''}{error.strerror}"
    if why:
        raise UserError(f"{path}: is named as a data file but is none ({why}). Mend it, or take it away.")
