"""The charts of TensorBoard's page of custom scalars: all tasks in one, and what tells how the run goes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

TASKS_A_CHART = 5  # as many marks of lines as TensorBoard has
OF_TASKS = {
    "training loss": "train/loss",
    "validation loss": "val/loss",
    "weights in the loss": "train/weight",
    "token accuracy in validations": "val/accuracy",
    "exact answers, as a share": "val/exact_match",
}
IN_PARTS = ("train/loss", "val/loss", "train/weight")  # those of many tasks also a few tasks at a time
OF_RUN = {
    "loss that is minimised, and mean validation loss": "(train|val)/loss",
    "learning rate": "train/lr",
    "gradient norm before clipping": "train/grad_norm",
    "tokens per second": "train/tokens_per_second",
    "model FLOPs utilisation": "train/mfu",
}


def charts(tasks: Sequence[str], kinds: Collection[str]) -> dict[str, dict[str, str]]:
    """A pattern of tags for each chart, by category and title; of many tasks also a few at a time.

    Args:
        tasks: their names.
        kinds: what is measured of each, as ``OF_TASKS`` has it.
    """
    of_tasks = {title: kind for title, kind in OF_TASKS.items() if kind in kinds}
    found = {
        "All tasks": {title: f"{kind}/.+" for title, kind in of_tasks.items()},
        "The run": {title: f"{tag}$" for title, tag in OF_RUN.items()},
    }
    parts = [tasks[start : start + TASKS_A_CHART] for start in range(0, len(tasks), TASKS_A_CHART)]
    for title in [title for title, kind in of_tasks.items() if kind in IN_PARTS and len(parts) > 1]:
        found[f"{title.capitalize()}, {TASKS_A_CHART} tasks a chart"] = {
            f"{part[0]} to {part[-1]}": f"{of_tasks[title]}/({'|'.join(map(re.escape, part))})$" for part in parts
        }
    return found


def layout(categories: Mapping[str, Mapping[str, str]]) -> Summary:
    """What the page is drawn by; its first two categories are open."""
    from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent
    from torch.utils.tensorboard.summary import custom_scalars

    summary = custom_scalars({})
    summary.value[0].tensor.string_val[0] = Layout(
        category=[
            Category(
                title=title,
                chart=[
                    Chart(title=name, multiline=MultilineChartContent(tag=[pattern]))
                    for name, pattern in of_category.items()
                ],
                closed=number > 1,
            )
            for number, (title, of_category) in enumerate(categories.items())
        ]
    ).SerializeToString()
    return summary
