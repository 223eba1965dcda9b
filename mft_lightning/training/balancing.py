"""Balancers at work: they are told every step's losses, and those of the validation batches that they ask for."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor

from mft_lightning.data.cycle import TaskCycle
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.errors import UserError
from mft_lightning.model.module import MFTModule
from mft_lightning.model.parallel import summed_over_data
from mft_lightning.training.hooks import check_hooks
from mft_lightning.training.loadable import check_states
from mft_lightning.weighting.balancer import Balancer


def check_balancing(module: MFTModule, datamodule: MFTDataModule) -> None:
    """Raise where the module's balancer cannot be called, has nothing to look at, or no state that comes back.

    Raises:
        UserError: naming the balancer, or the tasks without a conversation to validate on.
    """
    check_hooks("model.weighted_loss_mode", module.balancer, Balancer)
    check_states({f"{module.balancer.name} (model.weighted_loss_mode)": module.balancer.state_dict()})
    if not module.balancer.validates:
        return
    counts = np.bincount(datamodule.table("valid").tasks, minlength=len(datamodule.tasks))
    if missing := [name for name, count in zip(datamodule.task_names, counts, strict=True) if not count]:
        raise UserError(
            f"model.weighted_loss_mode: {module.balancer.name} looks at validation losses, but there is no "
            f"conversation to validate {', '.join(missing)} on. Give data.data_split a larger share or "
            "data.valid_data_paths a directory of it, or use case3 or famo."
        )


class Balancing(L.Callback):
    """Moves the tasks' weights at the end of each step that was not skipped: after it is logged, before it is saved."""

    _cycle: TaskCycle | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        module, step = cast(MFTModule, pl_module), trainer.global_step
        result, balancer = module.last_step, module.balancer
        assert result is not None
        if result.skipped or not balancer.learns:
            return
        train = _over_ranks(trainer, result.nll) / result.task_supervised.cpu()
        numbers = _due(balancer, step)
        valid = self._validate(trainer, module, numbers) if numbers else None
        balancer.after_step(step, train, valid)
        balancer.check_weights()

    def _validate(self, trainer: L.Trainer, module: MFTModule, numbers: range) -> Tensor:
        """NLL per supervised token of each task in balanced batches, the same on every rank, ``float64 [K]``."""
        datamodule, network = module.datamodule, module.network
        assert network is not None
        table, tasks = datamodule.table("valid"), len(datamodule.tasks)
        if self._cycle is None:
            self._cycle = TaskCycle(table.tasks, tasks, module.balancer.conversations_per_task, datamodule.seed)
        chosen = np.concatenate([self._cycle.batch(number) for number in numbers])
        steps = datamodule.evaluation_steps("valid", chosen)
        nll = torch.zeros(tasks, dtype=torch.float64, device=module.device)
        training = network.training
        network.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for place in range(len(steps)):
                micro = steps[place].to(module.device)
                nll.index_add_(0, micro.tasks, network(micro).nll.double())
        network.train(training)
        return _over_ranks(trainer, nll) / torch.from_numpy(
            np.bincount(table.tasks[chosen], weights=table.n_supervised[chosen], minlength=tasks)
        )


def _due(balancer: Balancer, step: int) -> range:
    """The validation batches that it asks for.

    Raises:
        UserError: it asks for something else, or has not said that it validates.
    """
    numbers = balancer.batches_due(step)
    if not isinstance(numbers, range):
        raise UserError(
            f"model.weighted_loss_mode: batches_due of {balancer.name} gave {numbers!r:.80}. It has to give a range of "
            "numbers, range(0) where none is due."
        )
    if numbers and not balancer.validates:
        raise UserError(
            f"model.weighted_loss_mode: {balancer.name} asks for validation batches, but has not said so before the "
            "run. Give the class validates = True."
        )
    return numbers


def _over_ranks(trainer: L.Trainer, part: Tensor) -> Tensor:
    return summed_over_data(trainer, part.clone()).cpu()
