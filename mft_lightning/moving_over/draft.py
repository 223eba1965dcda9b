"""A configuration being written: keys with their comments, and what is to be told beside them."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from typing import Any

from mft_lightning.yaml_text import WIDTH, as_yaml, comment_lines

ORDER = (
    "seed_everything",
    "output_dir",
    "tensorboard_dir",
    "ckpt_path",
    "data",
    "model",
    "trainer",
    "parallel",
    "evaluation",
    "checkpoint",
    "early_stopping",
)


@dataclass
class Draft:
    """Keys like ``data.seq_length`` and their values, in the order they are to stand in within a group.

    Attributes:
        values: by key.
        comments: by key; one line each.
        ignored: options without a key here, and why.
        remarks: what concerns no single key.
    """

    values: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, list[str]] = field(default_factory=dict)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, *comments: str) -> None:
        self.values[key] = value
        self.comments[key] = [comment for comment in comments if comment]

    def left_open(self) -> dict[str, list[str]]:
        """The variables that values leave open, each with the keys that need it."""
        found: dict[str, list[str]] = {}
        for key, value in self.values.items():
            for name in yaml_variables(value):
                found.setdefault(name, []).append(key)
        return found

    def text(self, title: str) -> str:
        """The configuration as YAML with comments; ``title`` is the first of them."""
        lines = comment_lines(title)
        if opened := self.left_open():
            told = ", ".join(f"{name} ({', '.join(keys)})" for name, keys in opened.items())
            lines += comment_lines(f"Left open, to be set in the environment of each run, or written in here: {told}.")
        for remark in self.remarks:
            lines += comment_lines(remark)
        groups = [line for group in ORDER for line in self._group(group)]
        lines += groups if groups[:1] == [""] else ["", *groups]
        if self.ignored:
            lines += ["", "# Without a key here:"]
            for name, why in self.ignored:
                lines += comment_lines(f"{name}: {why}", "#   ")
        return "\n".join(lines) + "\n"

    def _group(self, group: str) -> list[str]:
        if group in self.values:
            return self._key(group, group, "")
        keys = [key for key in self.values if key.startswith(f"{group}.")]
        if not keys:
            return []
        lines, inner = ["", f"{group}:"], ""
        nested = {key for key in keys if key.count(".") > 1}
        for key in [key for key in keys if key not in nested] + [key for key in keys if key in nested]:
            _, *between, last = key.split(".")
            if between and between[0] != inner:
                inner = between[0]
                lines.append(f"  {inner}:")
            lines += self._key(key, last, "    " if between else "  ")
        return lines

    def _key(self, key: str, name: str, indent: str) -> list[str]:
        written = textwrap.indent(as_yaml({name: self.values[key]}).rstrip("\n"), indent)
        comments = self.comments[key]
        short = f"{written} # {comments[0]}" if len(comments) == 1 and "\n" not in written else ""
        if short and len(short) <= WIDTH:
            return [short]
        above = [line for comment in comments for line in comment_lines(comment, f"{indent}# ")]
        return [*above, *written.splitlines()]


def yaml_variables(value: object) -> list[str]:
    """The names of ``${NAME}`` in a value."""
    if isinstance(value, list):
        return [name for item in value for name in yaml_variables(item)]
    return re.findall(r"\$\{(\w+)\}", value) if isinstance(value, str) else []
