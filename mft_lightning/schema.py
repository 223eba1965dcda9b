"""All keys of a run as a JSON Schema: types, choices, defaults and descriptions, as the parser has them.

An editor completes and checks a YAML file by it; messages about wrong values and ``--print_config`` speak from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse._completions_jsonschema import ParserJsonschema
from jsonargparse._link_arguments import ActionLink

from mft_lightning.variables import FORM

Node = dict[str, Any]
_VARIABLE = {"$ref": "#/$defs/variable"}


class _OpenClasses(ParserJsonschema):
    """jsonargparse's own schema, with any class by its path.

    The library's would take the subclasses that happen to be imported for all there are, and stumbles over torch's
    (``_completions_jsonschema.py``, ``subclass_def``; ``_typehints.py``, ``get_all_subclass_paths`` in 4.53).
    """

    def class_ref(self, class_type: Any, action: Any, subclass: bool) -> Node:
        name = class_type.__name__
        self.defs[name] = {
            "description": f"{_a(name)} by the path of its class, or by that with the arguments that it is made with.",
            "anyOf": [{"type": "string"}, class_form(name)],
        }
        return {"$ref": f"#/$defs/{name}"}

    def callable_schema(self, typehint: Any, action: Any) -> Node:
        """What makes an object of a class: such a class by its whole path, unlike words that may stand there too."""
        node: Node = super().callable_schema(typehint, action)
        if "anyOf" not in node:  # a function alone
            return node
        made: Node = node["anyOf"][-1]
        self.defs[made["$ref"].rpartition("/")[2]]["anyOf"][0] = {"type": "string", "pattern": r"\."}
        return made


def class_form(name: str) -> Node:
    """A class by its path, with its arguments."""
    return {
        "title": name,
        "type": "object",
        "additionalProperties": False,
        "required": ["class_path"],
        "properties": {
            "class_path": {"type": "string", "description": f"Where the {name} is, like package.module.Class."},
            "init_args": {"type": "object", "description": "The arguments that it is made with."},
            "dict_kwargs": {"type": "object", "description": "Arguments that its signature does not name."},
        },
    }


def schema_of(parser: ArgumentParser, changes: Mapping[str, Node] | None = None) -> Node:
    """The schema of a file with keys of a run; none is required, as files compose.

    Args:
        parser: of a command.
        changes: by key, what stands in the place of what the parser says of it.
    """
    schema: Node = _OpenClasses().generate(parser)
    schema.setdefault("$defs", {})["variable"] = {
        "type": "string",
        "pattern": FORM,
        "description": "An environment variable.",
    }
    linked = {action.dest for action in parser._actions if isinstance(action, ActionLink)}
    _tidy(schema, "", linked)
    for key, node in keys_of(schema):
        if changes and key in changes:
            kept = {name: node[name] for name in ("description", "default") if name in node}
            node.clear()
            node |= kept | changes[key]
        _or_variable(node, schema)
    return schema


def _tidy(group: Node, name: str, linked: set[str]) -> None:
    """Take out what is required, and keys that others decide; choices in one list, and plain words."""
    group.pop("required", None)
    for key, node in list(group["properties"].items()):
        full = f"{name}{key}"
        if full in linked:
            del group["properties"][key]
        elif "properties" in node:
            node["properties"].pop("$schema", None)
            _tidy(node, f"{full}.", linked)
            node["description"] = _plain(node.get("description", ""))
        elif "description" in node:
            node["description"] = _plain(node["description"])
            _join_choices(node)


def _join_choices(node: Node) -> None:
    """Choices and null as one list: editors tell what is in it."""
    parts = node.get("anyOf", [])
    if parts and all("enum" in part or part == {"type": "null"} for part in parts):
        listed = [value for part in node.pop("anyOf") for value in part.get("enum", [None])]
        node["enum"] = [*dict.fromkeys(listed)]


def _plain(text: str) -> str:
    """A docstring without reStructuredText, and without the default, which is told apart."""
    text = re.sub(r"\s*Defaults?:? ``[^`]*``\.?", "", text)
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?([^`]*)`", r"\1", text)
    return " ".join(text.replace("``", "").split())


def keys_of(schema: Node, group: str = "") -> Iterator[tuple[str, Node]]:
    """Every key with its node, in order; keys of a class that a path names are not among them."""
    for name, node in schema["properties"].items():
        if name == "$schema":
            continue
        if "properties" in node:
            yield from keys_of(node, f"{group}{name}.")
        else:
            yield group + name, node


def allowed(node: Node) -> str:
    """What a key takes, in words: ``an integer, or null``."""
    words = takes(node) or ["anything"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, or {words[-1]}"


def choices(node: Node) -> list[Any]:
    """The values that a key takes, where they are listed, without null."""
    found = [value for value in node.get("enum", []) if value is not None]
    for part in node.get("anyOf", []):
        found += choices(part)
    return found


def classes(node: Node) -> list[str]:
    """The kinds of classes that a key takes one or several of, by name."""
    if "anyOf" in node:
        return [name for part in node["anyOf"] for name in classes(part)]
    if isinstance(node.get("items"), dict):  # and no list of so many
        return classes(node["items"])
    if "properties" in node:
        return [node.get("title", "class")]
    return [node["$ref"].rpartition("/")[2]] if "$ref" in node and node != _VARIABLE else []


def arguments(kind: type) -> dict[str, Node]:
    """What each argument of a class takes, by name."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, fail_untyped=False)
    return dict(keys_of(schema_of(parser)))


def _takes_text(node: Node, schema: Node) -> bool:
    if "$ref" in node:
        return _takes_text(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    if "anyOf" in node:
        return any(_takes_text(part, schema) for part in node["anyOf"])
    return "string" in node.get("type", ["string"]) and not node.keys() & {"enum", "const", "pattern"}


def _or_variable(node: Node, schema: Node) -> None:
    """Let an environment variable stand for a value that is no text."""
    if _takes_text(node, schema):
        return
    about: Node = {name: node.pop(name) for name in ("description", "default", "deprecated") if name in node}
    own = node.pop("anyOf") if node.keys() == {"anyOf"} else [dict(node)]
    node.clear()
    node |= {"anyOf": [*own, _VARIABLE], **about}


_NAMES = {
    "string": "text",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "a mapping",
}


def takes(node: Node) -> list[str]:
    """What a key takes, each kind of value in words, null last."""
    if node == _VARIABLE:
        return []
    if "title" in node and "properties" not in node:  # in words of its own
        return [node["title"]]
    if "$ref" in node or "properties" in node:
        return [f"{_a(classes(node)[0])} by its class_path"]
    if "anyOf" in node:
        found = [word for part in node["anyOf"] for word in takes(part)]
    elif "enum" in node:
        found = [_one_of(choices(node))] + (["null"] if None in node["enum"] else [])
    elif "const" in node:
        found = [_written(node["const"])]
    else:
        kinds = node.get("type", [])
        found = [_kind(kind, node) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    return sorted(dict.fromkeys(found), key="null".__eq__)


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _one_of(values: list[Any]) -> str:
    written = ", ".join(dict.fromkeys(map(_written, values)))
    return f"one of {written}" if len(values) > 1 else written


def _written(value: Any) -> str:
    """As YAML has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _kind(kind: str, node: Node) -> str:
    inner = node.get("items" if kind == "array" else "additionalProperties")
    of = (
        " or ".join(re.sub(r"^an? (\w+)(?= by|$)", r"\1s", word).replace("its class", "class") for word in takes(inner))
        if inner
        else ""
    )
    return _NAMES[kind] + (f" of {of}" if of else "")
