"""The memory that the steps of a run need, beside what there is; said before the first one."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import numpy as np
import torch

from mft_lightning.commands.planned import network_of
from mft_lightning.errors import UserError
from mft_lightning.model.memory import peak
from mft_lightning.model.step_setup import Sharing, StepSetup
from mft_lightning.run_parser import DRY_RUN
from mft_lightning.training.run import Run

GIB = 2**30
LOOKED_AT = 20  # steps of the first epoch, of which the largest micro-batch is taken


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step needs on a device, and that the device has.

    Attributes:
        need: as ``estimate`` counts them, to a tenth.
        there: of a GPU, or a process's share of this machine.
        whose: that is.
        less: the command that tells what needs less; empty where a run has none.
    """

    need: int
    there: int
    whose: str
    less: str

    @property
    def fits(self) -> bool:
        return self.need <= self.there

    def __str__(self) -> str:
        return f"about {self.need / GIB:.2f} GiB of tensors in a step, of {self.there / GIB:.1f} GiB {self.whose}"

    @property
    def warning(self) -> str:
        """For a run whose steps do not fit."""
        return f"{self}." + (f" What needs less: {self.less}" if self.less else "")


def step_memory(trainer: L.Trainer, run: Run) -> StepMemory:
    """What the steps of a run need.

    Args:
        trainer: of the run, which has not begun.
        run: with its network built and its data set up.

    Raises:
        UserError: that is not known, and why.
    """
    device = trainer.strategy.root_device
    words = [word for word in run.settings.command[1:] if word != f"--{DRY_RUN}"]
    return StepMemory(
        need=peak(_setup(trainer, run)).total,
        there=_memory(trainer),
        whose="on each device" if device.type == "cuda" else "for each process",
        less=f"python -m mft_lightning estimate {shlex.join(words)}" if words else "",
    )


def _setup(trainer: L.Trainer, run: Run) -> StepSetup:
    """The largest micro-batch of the first steps, as conversations of one length."""
    parallel, plan = run.settings.parallel, run.datamodule.plan
    strategy: Any = trainer.strategy
    name = getattr(strategy, "short_name", None)
    if trainer.world_size > 1 and name not in ("ddp", "fsdp"):
        raise UserError(f"what {type(strategy).__name__} needs is not known.")
    groups = trainer.world_size // parallel.tensor_parallel_size
    dealt = [
        plan.deal_to_all(plan.global_batch(0, step), groups) for step in range(min(LOOKED_AT, plan.steps_per_epoch))
    ]
    lengths = [plan.lengths[part] for parts in dealt for part in parts if len(part)]
    largest = max(lengths, key=lambda part: int(part.sum() if plan.packed else part.max() * len(part)))
    return StepSetup(
        network=network_of(run.model, run.datamodule),
        precision=trainer.precision,
        sharing=cast(Sharing, name if trainer.world_size > 1 else "one device"),
        devices=trainer.world_size,
        parallel=parallel,
        checkpoint_activations=run.model.checkpoint_activations,
        conversations=len(largest),
        length=int(np.ceil(largest.mean()) if plan.packed else largest.max()),
        packed=plan.packed,
        micro_batches=max(len(parts) // groups for parts in dealt),
        device=strategy.root_device.type,
    )


def _memory(trainer: L.Trainer) -> int:
    """Bytes that a device has, or a process's share of this machine's."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // trainer.num_devices
