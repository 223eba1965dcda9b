"""Optimizer steps that were skipped because a loss or the gradient was not finite: counted, told, and ended."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import distributed as dist

from mft_lightning.aside import written_aside
from mft_lightning.data.place import data_parallel_place
from mft_lightning.errors import UserError
from mft_lightning.model.module import MFTModule
from mft_lightning.model.parallel import data_parallel_group
from mft_lightning.screen import json_line, printable, shown

SKIPPED_STEPS = "skipped_steps.jsonl"  # in the output directory: the skipped steps and their conversations
TOLD = 3  # conversations of a step that are named on the screen


class SkippedSteps(L.Callback):
    """Tells of every step that the optimizer skipped, and ends the run after ``model.max_skipped_steps`` in a row.

    Named are the conversations whose NLL is not finite; where all are, and only the gradient is not, any conversation
    of the global batch may be the cause. A step that is skipped counts as one: batches and learning rate go on.

    Args:
        file: a JSON line for every skipped step.

    Attributes:
        total: steps skipped so far, those before a resume among them.
        in_a_row: how many of the last steps, without one between them that was taken.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.total = self.in_a_row = 0

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Not among the states of callbacks: Lightning would warn whoever validates that this one is missing."""
        checkpoint["skipped_steps"] = {"total": self.total, "in_a_row": self.in_a_row}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("skipped_steps", {"total": 0, "in_a_row": 0})
        self.total, self.in_a_row = state["total"], state["in_a_row"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Cut the lines of steps that will now be taken again."""
        if trainer.is_global_zero and self.file.is_file():
            lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
            kept = [line for line in whole if json.loads(line)["step"] <= trainer.global_step]
            with written_aside(self.file) as aside:
                aside.write_text("".join(kept), encoding="utf-8")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        module = cast(MFTModule, pl_module)
        assert module.last_step is not None
        if not module.last_step.skipped:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        conversations = _conversations(module)
        if trainer.is_global_zero:
            self._tell(trainer.global_step, conversations)
        if self.in_a_row >= module.max_skipped_steps:
            raise UserError(
                f"step {trainer.global_step}: this is skipped step {self.in_a_row} in a row (model.max_skipped_steps). "
                f"Look at the conversations in {shown(self.file)}, or lower model.learning_rate; then start anew, or "
                "go on from an earlier checkpoint with --ckpt_path."
            )

    def _tell(self, step: int, conversations: list[dict[str, Any]]) -> None:
        faulty = [found for found in conversations if found["nll"] is None]
        self.file.parent.mkdir(parents=True, exist_ok=True)  # someone may have removed it
        with self.file.open("a", encoding="utf-8") as handle:
            handle.write(json_line({"step": step, "conversations": faulty or conversations}) + "\n")
        if not faulty:
            why = f"the gradient is not finite, though the losses of its {len(conversations)} conversations are"
        elif len(faulty) == len(conversations) > 1:
            why = f"the losses of all its {len(faulty)} conversations are not finite"
        else:
            named = [f"{found['task']} {', '.join(found['where'])}" for found in faulty[:TOLD]]
            named += [f"{len(faulty) - TOLD} more"] if len(faulty) > TOLD else []
            why = f"the loss is not finite of {'; '.join(named)}"
        print(printable(f"step {step} skipped: {why} ({shown(self.file)})"), flush=True)


def _conversations(module: MFTModule) -> list[dict[str, Any]]:
    """Task, file:line and NLL (None if it is not finite) of every conversation of the step, from all ranks."""
    step, datamodule = module.last_step, module.datamodule
    assert step is not None
    mine = torch.stack([torch.cat(step.numbers).double(), torch.cat(step.conversation_nll).double()]).tolist()
    parts: list[Any] = [mine]
    if (world := data_parallel_place(module.trainer)[1]) > 1:
        parts = [None] * world
        dist.all_gather_object(parts, mine, group=data_parallel_group(module.trainer))
    table, names = datamodule.table("train"), datamodule.task_names
    pairs = sorted(pair for numbers, nll in parts for pair in zip(map(int, numbers), nll, strict=True))
    return [
        {
            "task": names[table.tasks[number]],
            "where": [f"{shown(file)}:{line}" for file, line in table.where(number)],
            "nll": nll if math.isfinite(nll) else None,
        }
        for number, nll in pairs
    ]
