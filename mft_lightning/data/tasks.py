"""Task directories by name, and what is set for each of them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mft_lightning.errors import UserError, misread, nearest
from mft_lightning.shipped import expanded, shipped_example

_TASK_NAME = re.compile(r"[\w][\w .+-]*")


@dataclass(frozen=True)
class Task:
    """A directory of JSONL files; the last part of its path is the task's name, ``key`` is what named it."""

    name: str
    directory: Path
    key: str = "data.data_paths"


def parse_paths(paths: Sequence[str] | str, key: str) -> list[str]:
    """A YAML list, or the original's string ``"[a,b,c]"``, as a list of paths.

    Raises:
        UserError: naming ``key``, where nothing is left or a part is empty.
    """
    if isinstance(paths, str):
        inner = paths.strip()
        if inner.startswith("[") and inner.endswith("]"):
            inner = inner[1:-1]
        parts = [part.strip().strip("'\"") for part in inner.split(",")]
    else:
        parts = [str(part) for part in paths]
    if not parts or not all(parts):
        raise UserError(f"{key}: {paths!r} names no directory. Give a list of task directories, or '[a,b,c]'.")
    return parts


def find_tasks(paths: Sequence[str] | str, key: str = "data.data_paths") -> list[Task]:
    """The tasks that ``paths`` name, in order.

    Raises:
        UserError: two directories with one task name, names that differ in capitals or Unicode normalisation alone,
            which not every file system tells apart, one directory by two names, as each splits it for itself and one
            would be evaluated on what the other is trained on, or a name that cannot stand in a metric's tag.
    """
    tasks: dict[str, Task] = {}
    named: dict[str, str] = {}
    for path in parse_paths(paths, key):
        directory = expanded(shipped_example(path))
        name = Path(os.path.normpath(directory.absolute())).name  # of the path as given, also where it is a link
        if not _TASK_NAME.fullmatch(_without_marks(name)):
            raise UserError(
                f"{key}: {name!r} is no good task name. Use letters, digits, '_', '-', '.', '+' and spaces."
            )
        if other := tasks.get(_for_a_file_system(name)):
            but = _difference(other.name, name)
            raise UserError(f"{key}: {other.directory} and {directory} both name the task {name!r}{but}. Rename one.")
        tasks[_for_a_file_system(name)] = Task(name, directory, key)
        where = os.path.realpath(directory)
        if where in named:
            raise UserError(
                f"{key}: the tasks {named[where]!r} and {name!r} are one directory, {where}. Leave one out."
            )
        named[where] = name
    return list(tasks.values())


def _without_marks(name: str) -> str:
    """A name without the combining marks on its letters: accents on their own, vowel signs of Indic scripts."""
    kept = ""
    for sign in name:
        if not (kept[-1:].isalpha() and unicodedata.category(sign) in ("Mn", "Mc")):
            kept += sign
    return kept


def _for_a_file_system(name: str) -> str:
    """What is equal for names that a file system may take for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _difference(one: str, other: str) -> str:
    if one == other:
        return ""
    if one.casefold() == other.casefold():
        return ", but for capitals"
    same = unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)
    return ", but for " + ("" if same else "capitals and ") + "how its accents are encoded (Unicode NFC or NFD)"


def find_validation_tasks(paths: Sequence[str] | str | None, tasks: Sequence[Task]) -> list[Task]:
    """The separate validation directories, if there are such, each named as one of the tasks.

    Raises:
        UserError: a directory that is named as none of them, or is the task's own.
    """
    if paths is None:
        return []
    names = [task.name for task in tasks]
    found = find_tasks(paths, "data.valid_data_paths")
    if unknown := [task.name for task in found if task.name not in names]:
        raise UserError(
            f"data.valid_data_paths: {', '.join(unknown)} is none of the tasks {', '.join(names)}."
            + nearest(unknown[0], names)
        )
    own = {os.path.realpath(task.directory) for task in tasks}
    if same := [task for task in found if os.path.realpath(task.directory) in own]:
        raise UserError(
            f"data.valid_data_paths: {same[0].directory} is trained on too (data.data_paths). Give conversations that "
            "are not, or leave it out and set aside a share of each task by data.data_split."
        )
    return found


def in_task_order(values: Mapping[Any, Any], names: Sequence[str], key: str, what: str, instead: str = "") -> list[Any]:
    """The values of a mapping by task name, in the order of ``names``; a number (2024) may stand for the name.

    Raises:
        UserError: naming ``key`` and ``what`` is to be given, and ``instead`` of what else; a task without a value, or
            an unknown one.
    """
    named = {str(name) if str(name) in names else name: value for name, value in values.items()}
    if len(named) < len(values):
        raise UserError(f"{key}: gives a task two values, as in {{2024: 1, '2024': 2}}. Leave one of each out.")
    missing, unknown = [name for name in names if name not in named], [name for name in named if name not in names]
    if missing or unknown:
        other = [name for name in unknown if not isinstance(name, str)]
        found = [(kind, which) for kind, which in (("missing", missing), ("unknown", unknown)) if which]
        told = "; ".join(f"{kind}: {', '.join(map(repr, which))}" for kind, which in found)
        raise UserError(
            f"{key}: give one {what} for each of {', '.join(names)}{instead} ({told})."
            + (f" {misread(other)}" if other else nearest(unknown[0], names) if unknown else "")
        )
    return [named[name] for name in names]


def parse_task_weights(weights: dict[str, float] | list[float] | None, names: list[str]) -> list[float] | None:
    """Weights in the order of ``names``, scaled to mean 1; None where none are given.

    Raises:
        UserError: a task without a weight, an unknown task, or a weight that is not positive.
    """
    if weights is None:
        return None
    if isinstance(weights, dict):
        values = in_task_order(weights, names, "data.task_weights", "weight")
    else:
        values = list(weights)
    values = [float(value) for value in values]
    if len(values) != len(names) or not all(0 < value < float("inf") for value in values):
        raise UserError(f"data.task_weights: {weights} is not one positive number for each of {', '.join(names)}.")
    mean = sum(values) / len(values)
    return [value / mean for value in values]
