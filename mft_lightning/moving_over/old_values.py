"""Values of the original's options, read as what they are."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from mft_lightning.errors import UserError
from mft_lightning.moving_over.old_options import Kind
from mft_lightning.moving_over.shell_expansion import as_variables, as_written, open_names

_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")
_NAMES = {"whole": "a whole number", "number": "a number", "flag": "true or false", "text": "a text"}


@dataclass(frozen=True)
class Given:
    """A value that an option was given.

    Attributes:
        value: a text of a script, or what JSON holds.
        where: it was given: ``run.sh:41: --seed`` or ``config.json: seed``.
        typed: whether the value has a type of its own, as JSON's have.
    """

    value: Any
    where: str
    typed: bool = False


def read_value(given: Given, kind: Kind) -> Any:
    """An option's value by its kind.

    A value that is open, or has an open part, is a text with ``${NAME}`` for it, whatever the kind. None is null.

    Raises:
        UserError: it is of another kind, or only running a command would tell it.
    """
    value = given.value
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        return None
    if isinstance(value, str) and (names := open_names(value)):
        if commands := [name for name in names if name.startswith("$(")]:
            instead = ", or give its variables: --set NAME=VALUE" if re.search(r"\$\w", commands[0]) else ""
            raise UserError(
                f"{given.where}: is {as_written(value)}, and {commands[0]} is not run. Write what it comes to{instead}."
            )
        return _items(as_variables(value)) if kind == "list" else as_variables(value)
    if kind in ("list", "numbers"):
        return _list(given, kind)
    if kind == "flag":
        return _flag(given)
    if kind in ("whole", "number"):
        return _number(given, kind)
    if kind == "text" and not isinstance(value, str):
        raise _wrong(given, "text")
    return value


def is_open(value: object) -> bool:
    """Whether a value that was read has an open part."""
    return isinstance(value, str) and "${" in value


def _flag(given: Given) -> bool:
    if isinstance(given.value, bool):
        return given.value
    if isinstance(given.value, str) and not given.typed and given.value.lower() in (*_TRUE, *_FALSE):
        return given.value.lower() in _TRUE
    raise _wrong(given, "flag")


def _number(given: Given, kind: Kind) -> int | float:
    value = given.value
    if isinstance(value, str) and not given.typed:
        try:
            value = float(value) if kind == "number" else int(value)
        except ValueError:
            raise _wrong(given, kind) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(given, kind)
    if kind == "whole" and isinstance(value, float):
        if not value.is_integer():
            raise _wrong(given, kind)
        value = int(value)
    return value


def _list(given: Given, kind: Kind) -> list[Any] | None:
    value = given.value
    items = _items(value) if isinstance(value, str) else value
    if not isinstance(items, list):
        raise UserError(f"{given.where}: is {value!r}, no list. Write it as [a,b,c].")
    if kind == "list":
        if not items or not all(isinstance(item, str) and item for item in items):
            raise UserError(f"{given.where}: is {value!r}, and each of a list must be a text. Write it as [a,b,c].")
        return items
    try:
        return [_number(Given(item, given.where), "number") for item in items if item != "..."]
    except UserError as error:
        raise UserError(f"{given.where}: is {value!r}, no list of numbers. Write it as [1.0,2.0].") from error


def _items(text: str) -> list[str]:
    """The parts of ``[a,b,c]``; one where there are no brackets."""
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    return [part.strip().strip("'\"") for part in inner.split(",")]


def _wrong(given: Given, kind: Kind) -> UserError:
    value = as_written(given.value) if isinstance(given.value, str) else given.value
    return UserError(f"{given.where}: is {value!r}, where {_NAMES[kind]} must stand. Mend it.")
