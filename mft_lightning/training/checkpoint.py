"""When to save a checkpoint, and which to keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from mft_lightning.errors import UserError
from mft_lightning.model.module import MFTModule
from mft_lightning.screen import say
from mft_lightning.training.background import Background
from mft_lightning.training.checkpoint_choice import find_checkpoints
from mft_lightning.training.checkpoint_dirs import CheckpointInfo, directory_name
from mft_lightning.training.checkpoint_io import HFCheckpointIO, SaveOptions
from mft_lightning.training.evaluation import Evaluation
from mft_lightning.training.retention import Retention
from mft_lightning.training.same_run import set_position
from mft_lightning.training.shards import ShardWriter
from mft_lightning.training.stages import is_epoch_end, is_run_end
from mft_lightning.words import check_words


@dataclass(kw_only=True)
class CheckpointSettings:
    """When to save checkpoints and how many to keep.

    Args:
        save_strategy: "steps", "epoch" or both ("steps,epoch"). A new best and the end of a run save too.
        checkpointing_steps: optimizer steps between checkpoints.
        save_total_limit: step checkpoints to keep: 2 keeps the best and the latest. null keeps all.
        extra_save_by_epoch: save at every epoch's end too; those are never rotated.
        monitor: the validation metric that decides the best.
        mode: whether less or more of it is better.
        trainer_state: "all" lets every kept checkpoint resume; "latest" keeps the optimizer's state, of twice the size
            of the weights that train, in the latest alone, the only one that resumes.
        allow_changes: go on from a checkpoint although data, tokenizer, batch size, sampling or seed are others now.
            The run says what is lost. It holds for one start, and is not written to config.yaml.
        sharded: fsdp: every device writes its own part of weights and optimizer states; ``consolidate`` makes an
            ordinary model of such a checkpoint.
    """

    save_strategy: Literal["steps", "epoch", "steps,epoch", "epoch,steps"] = "steps"
    checkpointing_steps: int = 100
    save_total_limit: int | None = 2
    extra_save_by_epoch: bool = False
    monitor: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    trainer_state: Literal["all", "latest"] = "all"
    allow_changes: bool = False
    sharded: bool = False

    def __post_init__(self) -> None:
        check_words("checkpoint", type(self), vars(self))
        for key in ("checkpointing_steps", "save_total_limit"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"checkpoint.{key}: {value} is less than 1.")

    def retention(self, output_dir: Path, *, validated: bool) -> Retention:
        """What becomes of the checkpoints of a run with or without validations."""
        monitor = self.monitor if validated else None
        return Retention(output_dir, self.save_total_limit, monitor, self.mode, self.trainer_state)

    def due(self, trainer: L.Trainer) -> bool:
        """Whether the step just taken is one to save after, whatever a validation said."""
        by_steps = "steps" in self.save_strategy and trainer.global_step % self.checkpointing_steps == 0
        by_epoch = is_epoch_end(trainer) and ("epoch" in self.save_strategy or self.extra_save_by_epoch)
        return by_steps or by_epoch or is_run_end(trainer)


class HFModelCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint whose checkpoints are directories that know their own step, metrics and kind.

    It saves at a step's end, after the validation of that step if there is one (see :class:`Evaluation`). Training
    waits for a copy of what is saved; rank 0 writes it, and removes what is no longer kept, while training goes on.
    Which to keep is read from the directories themselves, so that a resumed run remembers what its earlier part found.
    """

    FILE_EXTENSION = ""

    def __init__(
        self,
        settings: CheckpointSettings,
        output_dir: Path,
        evaluation: Evaluation | None,
        checkpoint_io: HFCheckpointIO,
    ) -> None:
        super().__init__(dirpath=output_dir, filename=directory_name(0), save_top_k=-1, every_n_train_steps=1)
        self.settings, self.output_dir, self.evaluation = settings, output_dir, evaluation
        self.checkpoint_io = checkpoint_io
        self.monitor = settings.monitor if evaluation else None
        self.mode = settings.mode
        self.retention = settings.retention(output_dir, validated=evaluation is not None)
        self.saved_step = -1
        self._begun_at = 0
        self._background = Background()
        self._latest: CheckpointInfo | None = None  # which may still be in the making

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing: the directory is known, and that it is in use was checked before."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begun_at = trainer.global_step
        if self.settings.sharded:
            self.checkpoint_io.shard_writer = ShardWriter()
        if trainer.is_global_zero or self.settings.sharded:
            self.checkpoint_io.prepare()
        if trainer.is_global_zero:
            self.retention.begin(trainer.global_step)
        self._remember(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._background.raise_error()
        if self.saved_step != trainer.global_step and (self.settings.due(trainer) or self._is_new_best(trainer)):
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: the save waits for the end of the step."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """An epoch's checkpoint is saved at the end of its last step, unless a stop was asked for only then."""
        if trainer.should_stop and self._begun_at < trainer.global_step != self.saved_step:
            self._save(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """One that is saved after an epoch's end says the same of where it stands as one of that epoch's last step."""
        steps = trainer.fit_loop.epoch_loop.batch_progress.current
        if steps.completed == steps.ready:
            set_position(checkpoint, cast(MFTModule, pl_module).datamodule.plan.steps_per_epoch)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The last step has been saved, or is being saved."""
        self._background.wait()
        self._remember(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """An error does not cost the checkpoint that is being written; a second Ctrl-C waits for nothing."""
        if isinstance(exception, KeyboardInterrupt):
            return
        try:
            self._background.wait()
        except UserError as error:
            say(f"note: {error}")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: what there is to know stands in the directories."""

    def _metrics(self, trainer: L.Trainer) -> dict[str, float]:
        validated = self.evaluation is not None and self.evaluation.step == trainer.global_step
        return self.evaluation.metrics if self.evaluation and validated else {}

    def _is_new_best(self, trainer: L.Trainer) -> bool:
        metrics = self._metrics(trainer)
        if self.monitor is None or self.monitor not in metrics or self.settings.save_total_limit == 1:
            return False  # one that stays alone is the latest, and is no measure for those after it
        here = CheckpointInfo(Path(), trainer.global_step, metrics=metrics)
        best = trainer.is_global_zero and self.retention.best([*self._known(), here])
        return trainer.strategy.broadcast(best is here)

    def _known(self) -> list[CheckpointInfo]:
        """The checkpoints that are there, and the one that will be."""
        found = find_checkpoints(self.output_dir)
        coming = self._latest is not None and all(info.step != self._latest.step for info in found)
        return [*found, self._latest] if self._latest is not None and coming else found

    def _save(self, trainer: L.Trainer) -> None:
        self._background.wait()  # for the memory of the one before, which is as large
        step = trainer.global_step
        path = self.output_dir / directory_name(step)
        options = SaveOptions(
            epoch_end=self.settings.extra_save_by_epoch and is_epoch_end(trainer),
            metrics=self._metrics(trainer),
            background=self._background,
            afterwards=self.retention.apply,
        )
        for logger in trainer.loggers:
            logger.save()  # else a kill after the checkpoint could take points that come before it
        self._latest = CheckpointInfo(path, step, options.epoch_end, options.metrics)
        trainer.save_checkpoint(path, weights_only=False, storage_options=options)
        self.saved_step = self._last_global_step_saved = step

    def _remember(self, trainer: L.Trainer) -> None:
        """What users of ModelCheckpoint look at: the paths of the latest and the best, as rank 0 sees them."""
        checkpoints = trainer.strategy.broadcast(find_checkpoints(self.output_dir) if trainer.is_global_zero else [])
        self.last_model_path = str(checkpoints[-1].path) if checkpoints else ""
        best = self.retention.best(checkpoints)
        self.best_model_path = str(best.path) if best else ""
