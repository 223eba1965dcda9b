"""What a run says of itself after it ended: what every task came to, its checkpoints, and what to type next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mft_lightning.commands.report import Lines
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.model.saved_adapter import is_adapter
from mft_lightning.screen import Grid, labelled, program, shown
from mft_lightning.training.checkpoint import CheckpointSettings
from mft_lightning.training.checkpoint_choice import find_best, find_checkpoints
from mft_lightning.training.checkpoint_dirs import CheckpointInfo
from mft_lightning.training.shards import is_sharded_checkpoint

COLUMNS = (
    "task",
    "conversations",
    "supervised tokens",
    "loss before",
    "loss",
    "perplexity",
    "token accuracy",
    "exact match",
)
SPARE = ("perplexity", "supervised tokens")  # the exponential of a loss, and how much it was measured on


def task_results(
    datamodule: MFTDataModule,
    split: str,
    metrics: Mapping[str, float],
    *,
    before: Mapping[str, float] | None = None,
    exact: Mapping[str, tuple[int, int]] | None = None,
) -> Grid:
    """A row per evaluated task, and their mean.

    Args:
        datamodule: tells what was evaluated: conversations and supervised tokens.
        split: ``valid`` or ``test``.
        metrics: of that evaluation, as logged.
        before: of the validation before training, if there was one.
        exact: exact answers and all answers asked for, of each task, if any were.
    """
    evaluated, whole = datamodule.evaluated(split), datamodule.table(split)
    tasks, count = whole.tasks[evaluated], len(datamodule.tasks)
    conversations = np.bincount(tasks, minlength=count)
    supervised = np.bincount(tasks, weights=whole.n_supervised[evaluated], minlength=count)
    prefix = "test" if split == "test" else "val"
    rows = []
    for number, name in enumerate(datamodule.task_names):
        if not conversations[number]:
            continue
        right, of = (exact or {}).get(name, (0, 0))
        rows.append(
            [
                name,
                f"{conversations[number]:,}",
                f"{supervised[number]:,.0f}",
                _number((before or {}).get(f"{prefix}/loss/{name}")),
                _number(metrics.get(f"{prefix}/loss/{name}")),
                _number(metrics.get(f"{prefix}/perplexity/{name}")),
                _share(metrics.get(f"{prefix}/accuracy/{name}")),
                f"{right} of {of}" if of else "",
            ]
        )
    mean = ["mean over tasks", "", "", _number((before or {}).get(f"{prefix}/loss"))]
    rows.append([*mean, _number(metrics.get(f"{prefix}/loss")), "", "", ""])
    used = [number for number in range(len(COLUMNS)) if any(row[number] for row in rows)]
    titles = [datamodule.policy.unit if name == "conversations" else name for name in COLUMNS]
    shown_titles = [titles[number] for number in used]
    spare = [name for name in SPARE if name in shown_titles]
    return Grid(shown_titles, [[row[number] for number in used] for row in rows], spare=spare)


def run_summary(output_dir: Path, tensorboard_dir: Path, settings: CheckpointSettings, go_on: str) -> Lines:
    """The best and the last checkpoint, and what to type next.

    Args:
        output_dir: of the run.
        tensorboard_dir: of its curves.
        settings: say which is the best.
        go_on: what to add to the command that resumes.
    """
    checkpoints = find_checkpoints(output_dir)
    if not checkpoints:
        return ["no checkpoint was written."]
    last, best = checkpoints[-1], find_best(checkpoints, settings.monitor, settings.mode)
    lines = [("last checkpoint", shown(last.path))]
    if best is not None:
        label = "best kept" if settings.save_total_limit == 1 else "best checkpoint"  # 1 keeps the latest alone
        lines.append((label, f"{shown(best.path)} ({settings.monitor} {best.metrics[settings.monitor]:.4f})"))
    return [*labelled(lines), "", *labelled(next_commands(output_dir, tensorboard_dir, best or last, go_on))]


def next_commands(output_dir: Path, tensorboard_dir: Path, chosen: CheckpointInfo, go_on: str) -> list[tuple[str, str]]:
    """What each command is for, and the command as it is typed here."""
    run = f"{program('python')} -m mft_lightning"
    config = shown(output_dir / "config.yaml")
    commands = []
    if any(tensorboard_dir.glob("events.out.tfevents.*")):
        commands.append(("curves", f"{program('tensorboard')} --logdir {shown(tensorboard_dir)}"))
    model = shown(chosen.path)
    if is_sharded_checkpoint(chosen.path):
        whole = shown(output_dir / f"whole-{chosen.path.name}")
        commands.append(("one model", f"{run} consolidate --checkpoint {model} --output {whole}"))
        model = whole
    commands += [
        ("ask it", f'{run} generate --model {model} --prompt "..."'),
        ("go on", f"{run} fit --config {config} --ckpt_path last {go_on}".rstrip())
        if (output_dir / "config.yaml").is_file()
        else ("go on", 'trainer.fit(model, data, ckpt_path="last")'),  # of a run from Python
    ]
    if is_adapter(chosen.path):
        merged = shown(output_dir / f"merged-{chosen.path.name}")
        commands.append(("merge", f"{run} merge --adapter {model} --output {merged}"))
    return commands


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 1000 or not math.isfinite(value) else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
