"""The losses of tasks in one line of the screen, however many there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.cells import cell_len

MOST = 8  # tasks that a line has


def of_tasks(metrics: Mapping[str, Any], kind: str) -> dict[str, float]:
    """The metrics ``<kind>/<task>`` by the task's name."""
    begin = f"{kind}/"
    return {name.removeprefix(begin): float(value) for name, value in metrics.items() if name.startswith(begin)}


def in_a_line(losses: Mapping[str, float], width: int | None = None) -> str:
    """All of them in their order, or of more than fit the highest, and the lowest.

    Args:
        losses: by task.
        width: columns of the line. Default: any number of them, for ``MOST`` tasks.
    """
    if len(losses) <= MOST and _fits(whole := _joined(losses), width):
        return whole
    if not losses:
        return ""
    *highest, lowest = sorted(losses, key=lambda task: losses[task], reverse=True)
    for count in range(min(MOST - 1, len(highest)), 0, -1):
        first = _joined({task: losses[task] for task in highest[:count]})
        line = f"highest {first}  lowest {lowest} {losses[lowest]:.4f}  of {len(losses)} tasks"
        if _fits(line, width):
            return line
    return ""


def _joined(losses: Mapping[str, float]) -> str:
    return "  ".join(f"{task} {loss:.4f}" for task, loss in losses.items())


def _fits(line: str, width: int | None) -> bool:
    return width is None or cell_len(line) <= width
