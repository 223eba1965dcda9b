"""The original's ``*_train_config.json``."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft_lightning.errors import UserError, first_line
from mft_lightning.moving_over.old_values import Given
from mft_lightning.moving_over.shell_expansion import left_open

_VARIABLE = re.compile(r"\$(?:\{(?P<braced>[A-Za-z_]\w*)\}|(?P<plain>[A-Za-z_]\w*))")
_COMMENT = re.compile(r"^\s*(//|#|/\*)|,\s*(//|#|/\*)|[{}\[\]]\s*(//|#|/\*)")


def read_text(file: Path) -> str:
    """The text of a configuration or script.

    Raises:
        UserError: it cannot be read, or is no UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text (byte {error.start}). Give the original's file.") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}). Give the original's file.") from error


def read_config(text: str, name: str, known: Mapping[str, str]) -> dict[str, Given]:
    """The options of a train config.

    Args:
        text: JSON.
        name: of the file, for messages.
        known: variables that are known, which stand in texts as ``$NAME`` or ``${NAME}``; others are open.

    Raises:
        UserError: no JSON object, or a key twice.
    """
    try:
        read = json.loads(text, object_pairs_hook=_Pairs, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        row = text.split("\n")[error.lineno - 1]
        hint = " JSON has no comments: take them out." if _COMMENT.search(row) else " Mend it."
        if re.match(r"\s*[}\]]", row) or "trailing comma" in error.msg.lower():
            hint = " JSON has no comma after the last value: take it out."
        raise UserError(
            f"{name}:{error.lineno}: is not valid JSON ({error.msg}, column {error.colno}).{hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: is not valid JSON ({first_line(error)}). Mend it.") from error
    if not isinstance(read, _Pairs):
        raise UserError(f"{name}: is a JSON {type(read).__name__}, not an object of options.")
    if twice := [key for key, count in Counter(key for key, _ in read.pairs).items() if count > 1]:
        raise UserError(f"{name}: {twice[0]} stands twice. Leave one out.")
    return {key: Given(_opened(value, known), f"{name}: {key}", typed=True) for key, value in read.pairs}


class _Pairs:
    """An object with its keys as they stand."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs

    def __repr__(self) -> str:
        return "an object"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _opened(value: Any, known: Mapping[str, str]) -> Any:
    """A value whose texts have open variables for ``$NAME``."""
    if isinstance(value, list):
        return [_opened(item, known) for item in value]
    if not isinstance(value, str):
        return value
    return _VARIABLE.sub(lambda match: _known(match["braced"] or match["plain"], known), value)


def _known(name: str, known: Mapping[str, str]) -> str:
    return known.get(name, left_open(name))
