"""What a run says of itself before it starts and after it ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch

from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.token_cache import TaskReport
from mft_lightning.model.build import count_parameters
from mft_lightning.model.module import MFTModule
from mft_lightning.training.checkpoint import CheckpointSettings
from mft_lightning.training.checkpoint_dirs import CheckpointInfo, find_best, find_checkpoints


def run_plan(
    trainer: L.Trainer,
    module: MFTModule,
    datamodule: MFTDataModule,
    *,
    total_steps: int,
    output_dir: Path,
    resumed: CheckpointInfo | None,
) -> str:
    """Tasks, steps, parameters and layout of a run that is about to start."""
    sizes, plan, optim = datamodule.batch_sizes, datamodule.plan, module.optim
    assert module.network is not None
    trainable, total = count_parameters(module.network)
    lines = [
        *task_table(datamodule.reports),
        *(["validation directories:", *task_table(datamodule.valid_reports)] if datamodule.valid_reports else []),
        f"model: {module.source.path} ({module.source.init}, {module.peft_type or 'full'}), trainable parameters "
        f"{trainable:,} of {total:,} ({trainable / total:.2%})",
        f"batch: {sizes.total} conversations a step = {sizes.accumulation} micro-batch(es) of {sizes.per_device}, "
        f"{'packed' if datamodule.packed else 'padded'}; loss {module.weighted_loss_mode}",
        f"steps: {total_steps} ({plan.steps_per_epoch} an epoch), warm-up {optim.num_warmup_steps}, "
        f"{optim.lr_scheduler_type} from {optim.learning_rate:g}"
        + ("" if optim.lr_scheduler_type.startswith("constant") else f" to {optim.min_lr:g}"),
        f"device: {trainer.strategy.root_device}, precision {trainer.precision}",
        f"output: {output_dir}" + (f", going on from {resumed.path.name}" if resumed else ""),
    ]
    if optim.num_warmup_steps >= total_steps:
        lines.append(
            f"note: model.num_warmup_steps ({optim.num_warmup_steps}) reaches the last step; the rate never decays."
        )
    if "bf16" in str(trainer.precision) and trainer.strategy.root_device.type == "cpu" and not _fast_bfloat16():
        lines.append("note: this CPU has no fast bfloat16; 32-true is many times faster here.")
    return "\n".join(lines)


def _fast_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def task_table(reports: Sequence[TaskReport]) -> list[str]:
    """A line per task, and a line per reason for which records were left out."""
    width = max(len(report.task) for report in reports)
    lines = [f"{'task':{width}}   train   valid    test      tokens  supervised  left out"]
    for report in reports:
        counts = report.conversations
        left_out = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items()) or "0"
        lines.append(
            f"{report.task:{width}} {counts['train']:7,} {counts['valid']:7,} {counts['test']:7,} {report.tokens:11,} "
            f"{report.supervised_tokens / max(1, report.tokens):11.1%}  {left_out}"
            + (f"; {report.truncated} truncated" if report.truncated else "")
        )
    for report in reports:
        lines += [f"  left out of {report.task}, first {first}" for first in report.first_of.values()]
    return lines


def run_summary(output_dir: Path, tensorboard_dir: Path, settings: CheckpointSettings) -> str:
    """The best and the last checkpoint, and what to type next."""
    checkpoints = find_checkpoints(output_dir)
    if not checkpoints:
        return "no checkpoint was written."
    best = find_best(checkpoints, settings.monitor, settings.mode)
    lines = [f"last checkpoint: {checkpoints[-1].path}"]
    if best is not None:
        lines.append(f"best checkpoint: {best.path} ({settings.monitor} {best.metrics[settings.monitor]:.4f})")
    lines += [
        f"curves:  tensorboard --logdir {tensorboard_dir}",
        f'ask it:  python -m mft_lightning generate --model {(best or checkpoints[-1]).path} --prompt "..."',
    ]
    return "\n".join(lines)
