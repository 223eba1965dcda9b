"""A run's keys as YAML with what each is above it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from mft_lightning.schema import Node, allowed, choices
from mft_lightning.yaml_text import as_yaml, comment_lines


def commented(keys: Mapping[str, Any], schema: Node, documented: Callable[[str], str]) -> str:
    """Every key with its description, and the values to choose from where the description does not name them.

    Args:
        keys: nested, with their values.
        schema: of all keys there may be.
        documented: where a key or a group is documented, which groups are told with.
    """
    blocks = [_block(name, value, schema["properties"][name], documented, "") for name, value in keys.items()]
    return "\n".join(blocks)


def _block(name: str, value: Any, node: Node, documented: Callable[[str], str], group: str) -> str:
    about, indent = _about(node), "  " * group.count(".")
    if "properties" not in node:
        return _comment(about, indent) + textwrap.indent(as_yaml({name: value}), indent)
    parts, within = node["properties"], f"{group}{name}."
    inner = "".join(_block(part, held, parts[part], documented, within) for part, held in value.items())
    return f"{_comment(f'{about} See {documented(group + name)}.', indent)}{indent}{name}:\n{inner}"


def _comment(text: str, indent: str) -> str:
    return "".join(f"{line}\n" for line in comment_lines(text, f"{indent}# "))


def _about(node: Node) -> str:
    about = node.get("description", "").rstrip(".") + "."
    listed = [str(choice) for choice in choices(node)]
    return about if all(choice in about for choice in listed) else f"{about} It takes {allowed(node)}."
