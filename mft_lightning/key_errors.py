"""The parser's messages about keys, in the words of a user."""

from __future__ import annotations

import argparse
import ast
import difflib
import re
from collections.abc import Callable, Sequence, Set

from jsonargparse import ArgumentParser, Namespace

from mft_lightning.class_errors import class_error
from mft_lightning.errors import UserError, misread
from mft_lightning.refusals import Documented, given, missing, refusal
from mft_lightning.schema import Node, keys_of, schema_of, takes

KeyHere = Callable[[str], tuple[str, str] | None]  # a key of another program -> that of this one, and what to say of it

_UNKNOWN = (
    r"unrecognized arguments: --(?P<key>[\w.-]+)",
    r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[^']+)'",
    r"Option '(?P<key>[^']+)' is not accepted",
    r"[Kk]ey '(?P<key>[^']+)' is not expected",
)
_REQUIRED = r"^the following arguments are required: (?P<key>\w+\.[\w.]+)"
_NO_OPTION = re.compile(r"unrecognized arguments: (?P<word>[^-].*)", re.DOTALL)
_NO_NAMES = (
    r"key \"(?P<key>data\.data_paths|data\.valid_data_paths|evaluation\.exclude_tasks)\":"
    r".*<class 'str'>.* value: (?P<value>.*)"
)


# why an object cannot be made, and not what else could have been in its place
_REASON = (
    r"^  - (?!Expected a |Not a valid subclass)(?:Problem with given class_path '[\w.]+':)?(.*?)(?=^  - |^Given value)"
)
_LINKED = (
    r'Linked "(?P<key>[\w.]+)" must be given via "(?P<by>[\w., ]+)"',
    r"^argument (?P<by>[\w.]+) --> (?P<key>[\w.]+): ",  # of a key whose type is one of several
)
_REFUSED = re.compile(r'Parser key "(?P<key>[\w.]+)"[^:\n]*:(?P<why>.*)', re.DOTALL)


def parse(
    parser: ArgumentParser,
    argv: Sequence[str],
    schema: Callable[[], Node] | None = None,
    documented: Documented = lambda key: "--help",
    key_here: KeyHere = lambda key: None,
) -> Namespace:
    """The options of a command line.

    Args:
        parser: of the command.
        argv: the words after its name.
        schema: what each key takes. Default: what the parser says.
        documented: where a key is documented.
        key_here: what a key of another program is here.

    Raises:
        UserError: naming the key, and the nearest right one or what it takes.
    """
    parser.allow_abbrev = False  # a key that is cut short is a wrong one
    try:
        return parser.parse_args(argv)
    except argparse.ArgumentError as error:
        nodes = dict(keys_of(schema() if schema is not None else schema_of(parser)))
        options = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
        known = {option for option in options if option.replace("-", "_") in nodes}  # no groups
        known -= {key for key, node in nodes.items() if "deprecated" in node}  # which are refused too
        known |= options & {"config"}
        raise UserError(explain(str(error), known, nodes, documented, key_here)) from error


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
        named = re.search(r"class_path='(?P<path>[\w.]+)'", str(error))  # the first of a list that is no object yet
        reasons = re.findall(_REASON, str(error), re.MULTILINE | re.DOTALL)
        what = f"{named['path'].rpartition('.')[2]} cannot be made" if named else "a value is of no kind that it may be"
        raise UserError(f"{what}: {'; '.join(' '.join(reason.split()) for reason in reasons)}") from error


def explain(message: str, known: Set[str], nodes: dict[str, Node], documented: Documented, key_here: KeyHere) -> str:
    """A parser's message with what to do about it.

    Args:
        message: of jsonargparse.
        known: all keys there are, like ``data.seq_length``.
        nodes: what each takes, of a schema.
        documented: where a key is documented.
        key_here: what a key of another program is here.

    Returns:
        An unknown key with the nearest known one; names that YAML took for something else; a missing key said to be
        missing; a value that a key does not take, with what it takes; anything else without internals.
    """
    refused = _REFUSED.search(message)
    node = nodes.get(refused["key"], {}) if refused else {}
    if refused and (said := class_error(refused["key"], refused["why"], node, documented)) is not None:
        return said
    for pattern in _UNKNOWN:
        if match := re.search(pattern, message):
            found = match.groupdict()
            key = f"{found['group']}.{found['key']}" if found.get("group") else found["key"]
            meant, says = key_here(key) or ("", "")
            if meant in known:
                says = f" ({says})" if says else ""
                return f"{key}: there is no such key. Here it is {meant}{says}. See {documented(meant)}."
            near = _nearest_key(key, known)
            nearest_one = f" The nearest is {near}." if near is not None else ""
            return f"{key}: there is no such key.{nearest_one} See {documented(near or key)}."
    if (match := re.search(_REQUIRED, message)) and match["key"] in nodes:
        return missing(match["key"], documented)
    if match := _NO_OPTION.search(message):
        word = match["word"]
        if word.endswith((".yaml", ".yml")):
            return f"{word}: belongs to no option. Give a file with keys as --config {word}."
        return f"{word}: belongs to no option. A list or a value with blanks is one word: '[a,b,c]'."
    if (match := re.search(_NO_NAMES, message, re.DOTALL)) and (values := _no_text(match["value"])):
        return f"{match['key']}: {misread(values)}"
    if match := next(filter(None, (re.search(pattern, message) for pattern in _LINKED)), None):
        return f"{match['key']}: {follows(match['by'].split(', '), documented)}"
    message = re.sub(r"Call to compute_fn of link .*? failed: ", "", message, flags=re.DOTALL)
    if refused:
        key, why = refused["key"], refused["why"]
        if key in nodes:
            return _refused(key, why, node, documented)
        if "Unable to load config" in why:
            return f"{key}: is a group of keys, {key}.NAME. Give them one by one, or a YAML file of them."
    return re.sub(r'Parser key "([\w.]+)":', r"\1:", message)


def follows(others: Sequence[str], documented: Documented) -> str:
    """What to do instead of setting a key that others decide."""
    return f"follows {', '.join(others)}. Set it there. See {documented(others[0])}."


def _refused(key: str, why: str, node: Node, documented: Documented) -> str:
    """What a key takes, in place of all that the parser tried."""
    value = given(why)
    if value is None and "null" in takes(node):
        value = "None"  # which YAML has for text
    return refusal(key, value, node, documented)


def _no_text(written: str) -> list[object]:
    """Of a value as Python writes it, or of a list of such: what is no text; nothing where that is no single word."""
    try:
        found = ast.literal_eval(written)
    except (ValueError, SyntaxError):
        return []
    values = [value for value in (found if isinstance(found, list) else [found]) if not isinstance(value, str)]
    return values if all(value is None or isinstance(value, bool | int | float) for value in values) else []


def _nearest_key(key: str, known: Set[str]) -> str | None:
    """The known key that is spelt most alike, as a whole or in its last part."""
    last = {name.rpartition(".")[2]: name for name in sorted(known, reverse=True)}
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.7)
    near = near or [last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], last, n=1, cutoff=0.6)]
    return near[0] if near else None
