"""Where each key of a YAML text stands, of which YAML itself says nothing once it is read."""

from __future__ import annotations

import yaml

from mft_lightning.errors import UserError


def key_lines(text: str, path: str = "") -> dict[str, int]:
    """The line of each key like ``model.learning_rate``, from 1 on.

    Args:
        text: valid YAML.
        path: the file's name, for messages.

    Raises:
        UserError: a key stands twice in its group, where YAML's reader takes the last and drops the others; a group
            holds itself.
    """
    lines: dict[str, int] = {}
    _gather(yaml.compose(text, Loader=yaml.SafeLoader), "", path, lines, ())
    return lines


def _gather(
    node: yaml.Node | None, group: str, path: str, lines: dict[str, int], around: tuple[yaml.Node, ...]
) -> None:
    if node in around:
        raise UserError(
            f"{group.rstrip('.')}{f' ({path})' if path else ''}: holds itself, by its anchor. Write it out."
        )
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _gather(item, group, path, {}, (*around, node))
    if not isinstance(node, yaml.MappingNode):
        return
    here: dict[str, int] = {}
    for name, value in node.value:
        if not isinstance(name, yaml.ScalarNode) or name.value == "<<":
            continue
        key, line = f"{group}{name.value}", name.start_mark.line + 1
        if key in here:
            where = f"{path}:{line}" if path else f"line {line}"
            raise UserError(f"{key} ({where}): stands twice, in line {here[key]} too. Put all of it in one.")
        here[key] = lines[key] = line
        _gather(value, f"{key}.", path, lines, (*around, node))
