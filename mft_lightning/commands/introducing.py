"""A run's introduction in TensorBoard: its keys, what they are compared by, and the data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mft_lightning.commands.report import batch_line, sampling_line, task_table
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.survey import lengths_of, quantiles
from mft_lightning.screen import Grid
from mft_lightning.training.chart_layout import charts
from mft_lightning.training.introduction import Introduction
from mft_lightning.training.markdown import fenced, plain, table
from mft_lightning.training.run import Run
from mft_lightning.yaml_text import as_yaml

COMPARED_TASKS = 20  # most tasks whose metrics runs are compared by
MOST = 200  # characters of a key's value among the hyper-parameters
# A run from Python has no keys of its data and model, but what it was made from.
HYPER_PARAMETERS = ("seed_everything", "data", "model", "run", "trainer", "parallel", "early_stopping")


def introduction(config: Run) -> Introduction:
    """What TensorBoard shows of a run beside its curves; the data must be set up."""
    keys, datamodule, measured = config.keys, config.datamodule, _measured(config)
    lengths = {
        f"{name}{task.name}": lengths_of(corpus, number)
        for corpus, name in zip(datamodule.corpora, ("", "validation/"), strict=False)
        for number, task in enumerate(corpus.tasks)
    }
    return Introduction(
        charts=charts(datamodule.task_names, measured),
        keys=dict(_flat({name: keys[name] for name in HYPER_PARAMETERS if name in keys})),
        metrics=_metrics(datamodule, measured),
        texts={
            "run/config": fenced(as_yaml(keys), "yaml"),
            "run/data": _data_report(datamodule, {name: quantiles(values) for name, values in lengths.items()}),
        },
        lengths=lengths,
    )


def _flat(keys: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, int | float | str]]:
    """Every key by its full name, with a value that TensorBoard takes."""
    for key, value in keys.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        elif isinstance(value, (int, float, str)) and not isinstance(value, bool):  # which TensorBoard shows as 0 and 1
            yield name, value
        else:
            yield name, json.dumps(value)[:MOST]


def _measured(config: Run) -> list[str]:
    """What is measured of each task, the most telling first."""
    evaluation = config.settings.evaluation
    found = ["val/loss"] if evaluation.enabled else []
    found += ["val/exact_match"] if evaluation.exact_match_per_task is not None else []
    found += ["val/accuracy"] if evaluation.enabled else []
    return [*found, "train/loss", *(["train/weight"] if config.model.weighs_tasks else [])]


def _metrics(datamodule: MFTDataModule, measured: Sequence[str]) -> list[str]:
    """Tags of the curves whose ends tell runs apart, the most telling first."""
    tasks = [name for name in datamodule.task_names if name not in datamodule.exclude_tasks][:COMPARED_TASKS]
    of_tasks = [f"{kind}/{name}" for kind in measured if kind.startswith("val/") for name in tasks]
    every = [measured[0], *of_tasks, "train/loss", "train/tokens_per_second", "train/mfu"]
    return list(dict.fromkeys(every))


def _data_report(datamodule: MFTDataModule, lengths: Mapping[str, list[int]]) -> str:
    """What is trained on and what is not, as Markdown."""
    parts = [*task_table(datamodule.reports)]
    if datamodule.valid_reports:
        parts += ["validation directories", *task_table(datamodule.valid_reports)]
    parts.append(batch_line(datamodule))
    if datamodule.plan.draws:
        parts.append(sampling_line(datamodule.plan, datamodule.task_names))
    parts.append("tokens of a conversation, those included that are left out or cut as too long")
    rows = [[name, *(f"{value:,}" for value in values)] for name, values in lengths.items()]
    parts.append(Grid(["task", "median", "90 %", "99 %", "longest"], rows))
    return "\n\n".join(
        table(part.columns, part.rows) if isinstance(part, Grid) else plain(str(part)) for part in parts if part
    )
