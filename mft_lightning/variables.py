"""Environment variables in a run's YAML: ``${NAME}`` and ``${NAME:-default}``, as in a shell."""

from __future__ import annotations

import os
import re
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from mft_lightning.errors import UserError, misread
from mft_lightning.yaml_keys import key_lines

MODE = "yaml with variables"  # of a parser that reads them
_PLAIN = r"\$\{[A-Za-z_]\w*(?::-[^{}]*)?\}"
FORM = (
    rf"\$\{{[A-Za-z_]\w*(:-(?:{_PLAIN}|\$(?!\{{)|[^$}}])*)?\}}"  # whose default may hold such, but for their defaults
)
_ESCAPED_OR_FORM = re.compile(rf"\$\$\{{|{FORM}|\$\{{")
_read_yaml = get_loader("yaml")


def read(text: str, path: str = "") -> Any:
    """YAML as the parser reads it, with what variables hold in the place of their names.

    Keys stay as they are, and so do values on the command line, where the shell puts variables in.

    Args:
        text: of a file, or of one value.
        path: the file's name, for messages.

    Raises:
        UserError: a variable that is not set and has no default, or what is none; a file that is not YAML; a key that
            stands twice in its group.
    """
    try:
        return _read(text, path)
    except RecursionError as error:
        raise UserError(f"{path or text[:60]}: is nested too deeply to be read.") from error


def _read(text: str, path: str) -> Any:
    try:
        found = _read_yaml(text)
    except yaml.MarkedYAMLError as error:
        if not path:
            raise
        raise UserError(f"{path}{_place(error)}: is not valid YAML ({error.problem}).{_advice(error, text)}") from error
    if path and not isinstance(found, dict):
        raise UserError(f"{path}: holds no keys. Write them as group, colon, and the keys below it, indented.")
    if not isinstance(found, dict):
        return found
    return _filled(found, "", path, key_lines(text, path))


def escaped(value: Any) -> Any:
    """A value, of whatever depth, so written that :func:`read` gives it back."""
    if isinstance(value, dict):
        return {name: escaped(item) for name, item in value.items()}
    if isinstance(value, list):
        return [escaped(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


set_loader(MODE, read, (yaml.YAMLError,))


def _filled(value: Any, key: str, path: str, lines: dict[str, int]) -> Any:
    if isinstance(value, dict):
        if path and (other := [name for name in value if not isinstance(name, str)]):
            raise UserError(f"{key or 'the first level'}{_file(key, path, lines)}: {misread(other)}")
        return {name: _filled(item, f"{key}.{name}" if key else name, path, lines) for name, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, key, path, lines) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    return _replaced(value, value, f"{key}{_file(key, path, lines)}")


def _file(key: str, path: str, lines: dict[str, int]) -> str:
    """The file and the line of a key, or of the list that it is in."""
    if not path:
        return ""
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return f" ({path}:{lines[key]})" if key else f" ({path})"


def _replaced(text: str, value: str, where: str) -> str:
    """A value, or the default in it, with what variables hold."""
    return _ESCAPED_OR_FORM.sub(lambda match: _held(match[0], value, where), text)


def _held(found: str, value: str, where: str) -> str:
    """What a variable holds; its default also where it is set to nothing."""
    if found == "$${":
        return "${"
    if found == "${":
        raise UserError(
            f"{where}: {value!r} names no variable. Write ${{NAME}} or ${{NAME:-default}}; $${{ stands for the "
            "letters themselves."
        )
    name, colon, default = found[2:-1].partition(":-")
    held = os.environ.get(name, "")
    if held or colon:
        return held or _replaced(default, value, where)
    state = "is set to nothing" if name in os.environ else "is not set"
    raise UserError(
        f"{where}: the environment variable {name} {state}. Set it, as in export {name}=..., or give the key a "
        f"default: ${{{name}:-...}}."
    )


def _place(error: yaml.MarkedYAMLError) -> str:
    return f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""


def _advice(error: yaml.MarkedYAMLError, text: str) -> str:
    """Braces begin a mapping of their own between brackets."""
    line = error.problem_mark.line if error.problem_mark is not None else 0
    written = "".join(text.splitlines()[line : line + 1])  # nothing where the text ends in the middle of something
    return " Put a value with ${...} in quotes where it stands between [ ] or { }." if "${" in written else ""
