"""Small callbacks of a run: seeding every step, logging it, stopping early, writing a random base once."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import distributed as dist

from mft_lightning import ranks
from mft_lightning.aside import written_aside
from mft_lightning.data.place import data_parallel_place
from mft_lightning.data.tokenizer import save_tokenizer
from mft_lightning.errors import UserError
from mft_lightning.model.base import holds
from mft_lightning.model.export import save_base, save_causal_lm
from mft_lightning.model.gemm_peak import gemm_speed
from mft_lightning.model.metrics import tell_callbacks
from mft_lightning.model.module import MFTModule
from mft_lightning.model.parallel import summed_over_data
from mft_lightning.model.step_result import StepResult
from mft_lightning.model.weights import Weights
from mft_lightning.training.checkpoint import CheckpointSettings
from mft_lightning.training.retention import supersede
from mft_lightning.training.skipped_steps import SkippedSteps
from mft_lightning.training.stages import is_run_end


class StepSeeding(L.Callback):
    """Reseeds every rank at every step from (seed, step, data-parallel rank), so that there is no RNG state to lose.

    Ranks of one tensor-parallel group draw the same, as values that all of them have must have the same dropout.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        entropy = np.random.SeedSequence([self.seed, trainer.global_step, data_parallel_place(trainer)[0]])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


class EpochCount(L.Callback):
    """Keeps Lightning's count of epochs right where a run goes on from the last step of one.

    Lightning 2.6 then counts that epoch as processed, but takes the next one for the rest of it, and does not count it
    as begun (``_FitLoop.reset`` and ``on_advance_start``). After a second such resume it lost its place in the data.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loop = trainer.fit_loop
        now: Any = loop.epoch_progress.current
        if loop.restarted_mid_epoch and now.ready == now.processed:
            loop.reset_restart_stage()


class StepLogging(L.Callback):
    """Writes the training metrics of an optimizer step at its number, as exact sums over all ranks.

    Logged are the first step, every ``trainer.log_every_n_steps``-th, each that was skipped, and the last (unless the
    validation after it is what ends the run). A task that is absent from a step leaves a gap, and so does a number that
    is not finite. Weights of tasks that nothing moves are a line from the first step to the last. Tokens a second count
    saving, not validating; so does ``train/mfu``, the useful operations a second (``model/flops.py``) as a share of
    what all devices multiply matrices with, measured when training starts.

    Args:
        every: optimizer steps between two that are logged.
        skipped: counts the skipped ones.
        measures_peak: whether anybody would read ``train/mfu``.
    """

    def __init__(self, every: int, skipped: SkippedSteps, *, measures_peak: bool) -> None:
        self.every, self.skipped, self.measures_peak = every, skipped, measures_peak
        self._peak: float | None = None
        self._tokens = self._flops = 0
        self._since = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.measures_peak:
            self._peak = _gemm_peak(trainer, cast(MFTModule, pl_module).product_dtype)
        self._begin(time.perf_counter())

    def _begin(self, now: float) -> None:
        self._tokens, self._flops, self._since = 0, 0, now

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since += time.perf_counter() - self._paused

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        module = cast(MFTModule, pl_module)
        assert module.last_step is not None
        result, step = module.last_step, trainer.global_step
        self._tokens += result.tokens
        self._flops += result.flops
        if not (step == 1 or step % self.every == 0 or result.skipped or is_run_end(trainer)):
            return
        metrics = {k: v for k, v in self._metrics(trainer, module, result).items() if math.isfinite(v)}
        tell_callbacks(trainer, metrics)
        if "train/loss" in metrics:  # on the host, as Lightning reads at every step's end what a bar shows
            module.log("loss", torch.tensor(metrics["train/loss"]), prog_bar=True, logger=False)
        for logger in trainer.loggers:  # by hand, to give the step that the axis is defined by
            logger.log_metrics(metrics, step=step)

    def _metrics(self, trainer: L.Trainer, module: MFTModule, result: StepResult) -> dict[str, float]:
        names = module.datamodule.task_names
        sums = torch.cat([result.loss[None], result.nll, result.correct])
        loss, *sums_of_tasks = summed_over_data(trainer, sums).tolist()
        nll, correct = sums_of_tasks[: len(names)], sums_of_tasks[len(names) :]
        assert result.grad_norm is not None
        now = time.perf_counter()
        metrics = {"train/loss": loss}
        tokens = dict(zip(names, result.task_supervised.tolist(), strict=True))
        for kind, values in (("loss", nll), ("accuracy", correct)):
            metrics |= {f"train/{kind}/{n}": v / tokens[n] for n, v in zip(names, values, strict=True) if tokens[n]}
        if module.weighs_tasks and (module.balancer.learns or trainer.global_step == 1 or is_run_end(trainer)):
            metrics |= {f"train/weight/{n}": w for n, w in zip(names, module.balancer.weights.tolist(), strict=True)}
        metrics["train/lr"] = result.learning_rate
        metrics["train/grad_norm"] = result.grad_norm
        if total := self.skipped.total + result.skipped:  # this step is counted when it is logged
            metrics["train/skipped_steps"] = total
        seconds = max(now - self._since, 1e-9)
        metrics["train/tokens_per_second"] = self._tokens / seconds
        if self._peak is not None:
            metrics["train/mfu"] = self._flops / (seconds * self._peak)
        self._begin(now)
        return metrics


def _gemm_peak(trainer: L.Trainer, dtype: torch.dtype) -> float:
    """What the devices of all ranks multiply matrices with, in operations a second.

    All measure at the same time, so that what ranks of one machine share, like its memory, they share here too.
    """
    device = trainer.strategy.root_device
    trainer.strategy.barrier()
    speed = torch.tensor(gemm_speed(device, dtype), dtype=torch.float64, device=device)
    if ranks.are_several():
        dist.all_reduce(speed)
    return speed.item()


class ConfiguredEarlyStopping(EarlyStopping):
    """Lightning's EarlyStopping, whose patience a checkpoint does not bring back over the configured one."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that had stopped early, resumed as it was, takes no further step."""
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience


@dataclass(kw_only=True)
class EarlyStoppingSettings:
    """When to stop because validations no longer improve.

    Args:
        patience: consecutive validations without improvement; -1 never stops.
        min_delta: least change that counts as improvement.
    """

    patience: int = -1
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.patience < 1 and self.patience != -1:
            raise UserError(f"early_stopping.patience: {self.patience} is neither at least 1 nor -1 (never).")
        if not 0 <= self.min_delta < math.inf:
            raise UserError(f"early_stopping.min_delta: {self.min_delta} is no number from 0 on.")

    def callback(self, checkpoint: CheckpointSettings) -> EarlyStopping:
        """Lightning's EarlyStopping on the metric that decides the best checkpoint."""
        return ConfiguredEarlyStopping(
            checkpoint.monitor,
            patience=self.patience,
            min_delta=self.min_delta,
            mode=checkpoint.mode,
            check_on_train_epoch_end=False,
        )


class RandomBase(L.Callback):
    """Writes the random base of a LoRA run once, for the adapters to name, before a strategy shards it.

    That a resumed run draws the same base is checked by its digest (``same_run.py``), before anything starts. A run
    that was killed before its first checkpoint, and starts anew, may draw another one.

    Args:
        directory: of the base.
        resumed: whether the run goes on from a checkpoint.
    """

    def __init__(self, directory: Path, *, resumed: bool) -> None:
        self.directory, self.resumed = directory, resumed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        module = cast(MFTModule, pl_module)
        built = module.built
        assert built is not None
        model, base = built.network.causal_lm, built.base
        written = (self.directory / "config.json").is_file()
        if (written and self.resumed) or not trainer.is_global_zero or not base:
            return
        if self.directory.exists():
            if holds(self.directory, base, model):
                return
            supersede(self.directory)
        with written_aside(self.directory) as aside:
            aside.mkdir()
            if isinstance(base, Weights):
                save_base(model, base, aside)
            else:
                save_causal_lm(model, dict(base), aside)
            save_tokenizer(module.datamodule.tokenizer, aside)
