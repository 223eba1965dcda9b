"""What a run says of itself before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
from rich.text import Text

from mft_lightning.data.admission import TaskReport
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.plan import Plan
from mft_lightning.model.adapters import has_adapters
from mft_lightning.model.build import count_parameters
from mft_lightning.model.module import MFTModule
from mft_lightning.model.product_dtype import computes_bfloat16
from mft_lightning.model.whole_modules import are_embeddings_whole
from mft_lightning.screen import Grid, labelled, shown
from mft_lightning.training.checkpoint_dirs import CheckpointInfo
from mft_lightning.weighting.modes import MEANING

Lines = list[str | Text | Grid]
SKIPPED = "skipped.jsonl"  # in the output directory: all bad records that were left out


def run_plan(
    trainer: L.Trainer,
    module: MFTModule,
    datamodule: MFTDataModule,
    *,
    total_steps: int,
    memory: str,
    output_dir: Path,
    resumed: CheckpointInfo | None,
) -> Lines:
    """Tasks, steps, parameters, layout and memory of a run that is about to start."""
    plan, optim = datamodule.plan, module.optim
    assert module.network is not None
    trainable, total = count_parameters(module.network)
    rate = f"{optim.lr_scheduler_type} rate {optim.learning_rate:g}"
    if not optim.lr_scheduler_type.startswith("constant"):
        rate += f" to {optim.min_lr:g}"
    if optim.loraplus_lr_ratio is not None:
        trains = [name for name, parameter in module.network.named_parameters() if parameter.requires_grad]
        others = "" if module.matrices.issuperset(trains) else " and what is no matrix"
        rate += f", {optim.loraplus_lr_ratio:g} times that for lora_B{others}"
    lines: Lines = task_table(datamodule.reports)
    if datamodule.valid_reports:
        lines += ["", "validation directories", *task_table(datamodule.valid_reports)]
    lines += [
        "",
        *labelled(
            [
                ("model", f"{shown(Path(module.source.path))} ({module.source.init}), {module.peft_type or 'full'}"),
                *([("adapters", adapters_line(module))] if module.peft_type is not None else []),
                *whole_line(module, datamodule),
                ("parameters", f"{trainable:,} trainable parameters of {total:,} ({trainable / total:.2%})"),
                ("batch", batch_line(datamodule)),
                *([("sampling", sampling_line(plan, datamodule.task_names))] if plan.draws else []),
                ("loss", f"{module.weighting}: {MEANING.get(module.weighting, 'weights of tasks move')}"),
                (
                    "steps",
                    f"{total_steps:,} ({plan.steps_per_epoch:,} an epoch), warm-up {optim.num_warmup_steps}, {rate}",
                ),
                ("device", _device_line(trainer)),
                ("memory", memory),
                ("output", shown(output_dir) + (f", going on from {resumed.path.name}" if resumed else "")),
            ]
        ),
    ]
    if bad := sum(report.bad for report in [*datamodule.reports, *datamodule.valid_reports]):
        lines.append(f"note: {bad:,} bad record(s) are left out, each with its reason in {shown(output_dir / SKIPPED)}")
    if optim.num_warmup_steps >= total_steps:
        lines.append(
            f"note: model.num_warmup_steps ({optim.num_warmup_steps}) reaches the last step; the rate never decays."
        )
    if "bf16" in str(trainer.precision) and trainer.strategy.root_device.type == "cpu" and not computes_bfloat16():
        lines.append("note: this CPU has no fast bfloat16; 32-true is many times faster here.")
    return [*lines, ""]


def whole_line(module: MFTModule, datamodule: MFTDataModule) -> list[tuple[str, str]]:
    """What trains whole beside adapters, and why; and what becomes of new tokens where their rows do not train."""
    assert module.network is not None
    model = module.network.model
    if not has_adapters(model):
        return []
    names = cast(Any, model.peft_config["default"]).modules_to_save or []
    lines = []
    if names:
        grown = module.built is not None and module.built.base_rows is not None
        why = "model.lora.modules_to_save" if module.lora.modules_to_save is not None else "for new tokens"
        why = "model.lora.start_from" if module.lora.start_from is not None else why
        lines = [("whole", f"{', '.join(names)} ({why}{', and rows for them' if grown else ''})")]
    if datamodule.new_tokens and not are_embeddings_whole(module.network.causal_lm, names):
        said = f"the model has never seen {len(datamodule.new_tokens)} of its tokens, and their rows do not all train"
        lines.append(("note", f"{said} (model.lora.modules_to_save)"))
    return lines


def _device_line(trainer: L.Trainer) -> str:
    several = f" on each of {trainer.num_nodes} nodes" if trainer.num_nodes > 1 else ""
    name, shared = getattr(trainer.strategy, "short_name", None), getattr(trainer.strategy, "sharing", 1)
    how = f", {name}" if name else ""
    how += f", {shared} of them share each layer" if shared > 1 else ""
    return f"{trainer.num_devices} x {trainer.strategy.root_device.type}{several}{how}, precision {trainer.precision}"


def adapters_line(module: MFTModule) -> str:
    """The shape of the adapters, and what they start from."""
    said, start = str(module.description["model.lora"]), module.lora.start_from
    return f"{said}, from {shown(Path(start))}" if start is not None else said


def batch_line(datamodule: MFTDataModule) -> str:
    """What a step holds, and the micro-batches it is cut into."""
    sizes, plan, unit = datamodule.batch_sizes, datamodule.plan, datamodule.policy.unit
    if sizes.tokens is None:
        said = f"{sizes.total} {unit} a step = {sizes.accumulation} micro-batch(es) of {sizes.per_device}"
        said += f" on each of {datamodule.devices} devices" if datamodule.devices > 1 else ""
    else:
        mean = (plan.drawn - plan.left_out) / plan.steps_per_epoch
        said = f"up to {sizes.tokens:,} tokens a step ({plan.fill:.1%} filled), {mean:.1f} {unit} on average, in "
        if sizes.per_device is None:
            said += f"{sizes.accumulation} micro-batch(es)"
        else:
            said += f"micro-batches of {sizes.per_device}"
    rows = "cut from each task's stream" if datamodule.policy.concat else "padded rows"
    if datamodule.packed:
        rows = "packed end to end"
    return f"{said}, {rows}, up to {datamodule.policy.seq_length} tokens each"


def sampling_line(plan: Plan, names: Sequence[str]) -> str:
    """Each task's share of the draws, how often an epoch sees each of its conversations, and draws without a place."""
    draws = plan.draws
    assert draws is not None
    parts = [
        f"{name} {drawn / plan.drawn:.1%} ({drawn / len(members):.2f} times an epoch)"
        for name, drawn, members in zip(names, draws.per_epoch, draws.members, strict=True)
    ]
    if plan.drawn != len(plan.lengths):
        parts.append(f"{plan.drawn:,} draws an epoch of {len(plan.lengths):,}, so that its steps are full")
    if plan.sizes.tokens is not None:
        parts.append(f"{plan.left_out:,} of {plan.drawn:,} draws left out of the first epoch for want of room")
    return ", ".join(parts)


def task_table(reports: Sequence[TaskReport]) -> Lines:
    """A line per task, and a line per reason for which records were left out."""
    columns = ("task", "train", "valid", "test", "tokens", "supervised", "left out")
    rows = [
        [
            report.task,
            *(f"{report.conversations[split]:,}" for split in ("train", "valid", "test")),
            f"{report.tokens:,}",
            f"{report.supervised_tokens / max(1, report.tokens):.1%}",
            left_out(report),
        ]
        for report in reports
    ]
    return [Grid(columns, rows, left=("left out",)), *notes(reports)]


def left_out(report: TaskReport) -> str:
    """Records that are not trained on, by reason, and those that are cut."""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items()) or "0"
    return counts + (f"; {report.truncated:,} truncated" if report.truncated else "")


def notes(reports: Sequence[TaskReport]) -> list[str]:
    """Where the first record of every task and reason that is left out stands, and what was not read at all."""
    first = [f"  left out of {report.task}, first: {first}" for report in reports for first in report.first_of.values()]
    return first + [
        f"  not read of {report.task}: {_some(report.unread)}; its data are *.jsonl, *.jsonl.gz and *.jsonl.zst files"
        for report in reports
        if report.unread
    ]


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
