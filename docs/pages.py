"""Pages of the site that are made when it is built: the overview out of README.md, and all keys out of the code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from mft_lightning.commands.schema import Keys
from mft_lightning.documented import page
from mft_lightning.schema import Node, allowed, keys_of, takes

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them to the files of the site."""
    for name, content in (("index.md", overview()), ("reference.md", reference())):
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **about: Any) -> str:
    """README.md by its name on the site."""
    return markdown.replace("](../README.md", "](index.md")


def overview() -> str:
    """README.md, whose links to pages are from the root on."""
    return (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")


def reference() -> str:
    """A table of keys for each group: what it takes, what it is by default, what it means, and where that stands."""
    schema: Any = Keys().parser.schema()
    nodes = dict(keys_of(schema))
    groups = list(dict.fromkeys(_group(key) for key in nodes))
    parts = [
        "# All keys",
        "Each can stand in a YAML file, `group: {key: value}`, or on the command line, `--group.key value`. Made from "
        "the code when this page was built; `--print_config` prints the same with the values of a run, `schema` gives "
        "it to an editor ([configuration](configuration.md)). Keys of Lightning's Trainer that would do nothing here "
        "are left out: a run refuses them, and names the key to use.",
    ]
    for group in groups:
        keys = {key: node for key, node in nodes.items() if _group(key) == group and "deprecated" not in node}
        parts.append(f"## {group or 'the whole run'}")
        if group and (about := _node(schema, group).get("description")):
            parts.append(f"{about.rstrip('.')}. See {_link(page(group))}.")
        parts.append("\n".join(_rows(keys, group)))
    return "\n\n".join(parts) + "\n"


def _group(key: str) -> str:
    return key.rpartition(".")[0]


def _node(schema: Node, group: str) -> Node:
    for name in group.split("."):
        schema = schema["properties"][name]
    return schema


def _rows(keys: dict[str, Node], group: str) -> Iterator[str]:
    yield "| key | takes | default | what it is |\n|---|---|---|---|"
    for key, node in keys.items():
        default = "must be given"
        if "default" in node or "null" in takes(node):
            default = f"`{_cell(json.dumps(node.get('default')))}`"
        where = "" if page(key) in (page(group) if group else "", "--help") else f" {_link(page(key))}"
        about = _cell(node.get("description", ""))
        yield f"| `{key.rpartition('.')[2]}` | {_cell(allowed(node))} | {default} | {about}{where} |"


def _link(place: str) -> str:
    """``docs/data.md#splits`` as a link of the site."""
    file = place.removeprefix("docs/")
    return f"[{re.sub('[-_]', ' ', file.partition('#')[2] or Path(file).stem)}]({file})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
