"""A run's keys as YAML with what each is above it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from mft_lightning.schema import Node, allowed, choices
from mft_lightning.yaml_text import as_yaml

WIDTH = 120


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
    about = _about(node)
    if "properties" not in node:
        return textwrap.indent(_comment(about) + as_yaml({name: value}), "  " * group.count("."))
    parts, within = node["properties"], f"{group}{name}."
    inner = "".join(_block(part, held, parts[part], documented, within) for part, held in value.items())
    indent = "  " * group.count(".")
    return textwrap.indent(_comment(f"{about} See {documented(group + name)}."), indent) + f"{indent}{name}:\n{inner}"


def _about(node: Node) -> str:
    about = node.get("description", "").rstrip(".") + "."
    listed = [str(choice) for choice in choices(node)]
    return about if all(choice in about for choice in listed) else f"{about} It takes {allowed(node)}."


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, WIDTH - 2, break_on_hyphens=False))
