"""The parser's messages about keys, in the words of a user."""

from __future__ import annotations

import argparse
import ast
import difflib
import re
from collections.abc import Sequence, Set

from jsonargparse import ArgumentParser, Namespace

from mft_lightning.errors import UserError, misread

_UNKNOWN = (
    r"unrecognized arguments: --(?P<key>[\w.]+)",
    r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'",
    r"Option '(?P<key>[\w.]+)' is not accepted",
    r"[Kk]ey '(?P<key>[\w.]+)' is not expected",
)
_NO_NAMES = (
    r"key \"(?P<key>data\.data_paths|data\.valid_data_paths|evaluation\.exclude_tasks)\":"
    r".*<class 'str'>.* value: (?P<value>.*)"
)


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """The options of a command line.

    Raises:
        UserError: naming the key, and the nearest right one.
    """
    try:
        return parser.parse_args(argv)
    except argparse.ArgumentError as error:
        known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
        raise UserError(explain(str(error), known)) from error


def instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    """The objects that a configuration describes.

    Raises:
        UserError: a class that a class path names cannot be made, with its own reason.
    """
    try:
        return parser.instantiate(config)
    except ValueError as error:
        if "any of the Union subtypes" not in str(error):
            raise
        named = re.search(r"class_path='(?P<path>[\w.]+)'", str(error))
        reasons = re.findall(r"^  - (?!Expected a )(.*?)(?=^  - |^Given value)", str(error), re.MULTILINE | re.DOTALL)
        what = f"{named['path'].rpartition('.')[2]} cannot be made" if named else "a value is of no kind that it may be"
        raise UserError(f"{what}: {'; '.join(' '.join(reason.split()) for reason in reasons)}") from error


def explain(message: str, known: Set[str]) -> str:
    """A parser's message with what to do about it.

    Args:
        message: of jsonargparse.
        known: all keys there are, like ``data.seq_length``.

    Returns:
        An unknown key with the nearest known one; names that YAML took for something else; a missing key said to be
        missing; anything else without internals.
    """
    for pattern in _UNKNOWN:
        if match := re.search(pattern, message):
            found = match.groupdict()
            key = f"{found['group']}.{found['key']}" if found.get("group") else found["key"]
            return f"{key}: there is no such key.{_nearest(key, known)}"
    if (match := re.search(_NO_NAMES, message, re.DOTALL)) and (values := _no_text(match["value"])):
        return f"{match['key']}: {misread(values)}"
    if match := re.search(r'[Kk]ey "(?P<key>[\w.]+)":.*Got value: None$', message, re.DOTALL):
        return f"{match['key']}: is missing. Give it in a --config file or on the command line."
    message = re.sub(r"Call to compute_fn of link .*? failed: ", "", message, flags=re.DOTALL)
    message = re.sub(r'Parser key "([\w.]+)":', r"\1:", message)
    message = message.replace("typing.", "").replace("<class 'NoneType'>", "null")
    return re.sub(r"<class '(\w+)'>", r"\1", message)


def _no_text(written: str) -> list[object]:
    """Of a value as Python writes it, or of a list of such: what is no text; nothing where that is no single word."""
    try:
        read = ast.literal_eval(written)
    except (ValueError, SyntaxError):
        return []
    values = [value for value in (read if isinstance(read, list) else [read]) if not isinstance(value, str)]
    return values if all(value is None or isinstance(value, bool | int | float) for value in values) else []


def _nearest(key: str, known: Set[str]) -> str:
    """The known key that is spelt most alike, as a whole or in its last part."""
    last = {name.rpartition(".")[2]: name for name in sorted(known, reverse=True)}
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.7)
    near = near or [last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], last, n=1, cutoff=0.6)]
    return f" The nearest is {near[0]}." if near else ""
