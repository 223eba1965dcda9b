"""A network in training: one Lightning batch is one optimizer step."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from mft_lightning.data.collate import MicroBatch, StepBatch
from mft_lightning.data.place import data_parallel_place
from mft_lightning.model.evaluated import EvaluatedModule
from mft_lightning.model.flops import UsefulFlops
from mft_lightning.model.gradients import clip_gradients, gradients_kept_local, telling
from mft_lightning.model.optim import OptimizerSettings, group_settings, put_in_force
from mft_lightning.model.parallel import live_parameters
from mft_lightning.model.step_result import StepResult
from mft_lightning.weighting.balancer import Balancer
from mft_lightning.weighting.modes import TASK_WEIGHTED_MODES, OwnBalancer, WeightingMode, static_mode
from mft_lightning.weighting.static import coefficients


class TrainedModule(EvaluatedModule):
    """A network and what trains it.

    Args:
        optim: the optimizer and its learning rate.
        weighted_loss_mode: what conversations count.

    Attributes:
        balancer: of the tasks' weights, once there is a network.
        matrices: names of the network's parameters that decay.
        useful_flops: of the network, before a strategy shards it.
        product_dtype: of matrix products.
        last_step: what the last optimizer step leaves behind.
    """

    balancer: Balancer
    product_dtype: torch.dtype

    def __init__(self, optim: OptimizerSettings, weighted_loss_mode: WeightingMode | OwnBalancer) -> None:
        super().__init__()
        self.optim, self.weighted_loss_mode = optim, weighted_loss_mode
        self.matrices: set[str] = set()
        self.useful_flops = UsefulFlops(0, 0, 0)
        self.last_step: StepResult | None = None

    @property
    def weighting(self) -> str:
        """What the losses of tasks are weighted by, in a word."""
        return self.weighted_loss_mode if isinstance(self.weighted_loss_mode, str) else self.balancer.name

    @property
    def weighs_tasks(self) -> bool:
        """Whether the weighting mode has a weight per task."""
        return self.balancer.learns or self.weighted_loss_mode in TASK_WEIGHTED_MODES

    def configure_optimizers(self) -> OptimizerLRScheduler:
        scaled = self.product_dtype == torch.float16
        parameters = live_parameters(self._network)
        optimizer, scheduler = self.optim.build(parameters, self.matrices, self.total_steps(), scaled=scaled)
        self.group_settings = group_settings(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Put the configured rates and decays in force, where Lightning restored those of the checkpoint's run."""
        (optimizer,), (config,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        put_in_force(self.group_settings, optimizer, cast(torch.optim.lr_scheduler.LambdaLR, config.scheduler))

    def total_steps(self) -> int:
        """Optimizer steps of the whole run. ``trainer.estimated_stepping_batches`` would build the loaders early and
        lose their state on resume (https://github.com/Lightning-AI/pytorch-lightning/issues/20550)."""
        return self.datamodule.plan.total_steps(self.trainer.max_epochs, self.trainer.max_steps)

    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        """Forward and backward over this rank's micro-batches; the last one's backward is left to Lightning.

        Each loss is multiplied by the number of data-parallel ranks, which undoes the averaging of gradients over them.
        """
        self.trainer.optimizers[0].zero_grad()
        *head, last = batch.micros
        result = StepResult.of(batch, self.useful_flops, self.trainer.optimizers[0].param_groups[0]["lr"])
        self.last_step = result
        with gradients_kept_local(self._network):
            for micro in head:
                self.trainer.strategy.backward(self._micro_loss(micro, batch, result), None)
        return self._micro_loss(last, batch, result)

    def _micro_loss(self, micro: MicroBatch, batch: StepBatch, result: StepResult) -> Tensor:
        output = self._network(micro, partial(self._factors, batch))
        result.add(micro, output)
        return telling(output.loss) * data_parallel_place(self.trainer)[1]

    def _factors(self, batch: StepBatch, micro: MicroBatch) -> Tensor:
        """What each conversation of a micro-batch counts in its step, ``float64 [C]``."""
        return coefficients(
            static_mode(self.weighted_loss_mode),
            tasks=micro.tasks,
            n_supervised=micro.n_supervised,
            task_conversations=batch.task_conversations,
            task_supervised=batch.task_supervised,
            weights=self.balancer.weights.to(self.device, non_blocking=True),
        )

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Nothing: Lightning calls it between ``training_step`` and the last backward, and would clear the others'."""

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of the gradient over all ranks, and keep the norm before clipping for the logs."""
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            return  # whose engine clips, skips what is not finite, and tells the norm afterwards
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = clip_gradients(self._network, parameters, gradient_clip_val)
        if self.last_step is not None:
            self.last_step.grad_norm = norm
