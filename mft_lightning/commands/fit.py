"""``fit``: train, from a YAML file to checkpoints that resume."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, cast

import lightning as L

from mft_lightning.commands.report import run_plan, run_summary
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.errors import UserError
from mft_lightning.quiet import quieten
from mft_lightning.run_config import RunConfig
from mft_lightning.training.callbacks import GracefulStop
from mft_lightning.training.checkpoint_dirs import CheckpointInfo, find_checkpoints, resolve_checkpoint
from mft_lightning.training.trainer import fit_trainer, refuse_several_ranks


class WriteConfig(L.Callback):
    """Writes the run's keys to ``config.yaml`` once everything else stands."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.config.output_dir.mkdir(parents=True, exist_ok=True)
            self.config.save(self.config.output_dir / "config.yaml")


def fit(argv: list[str]) -> None:
    """Check everything that can be wrong first, then train; nothing is written before."""
    quieten()
    config = RunConfig(argv, "fit")
    keys = config.trainer_keys(config.config_init)
    resumed = _resumed(config)
    module, datamodule = config.model, config.datamodule
    module.check(datamodule)
    datamodule.setup("fit")
    if config.settings.evaluation.enabled:
        datamodule.check_evaluation("valid")
        _check_monitor(config.settings.checkpoint.monitor, datamodule)
    module.build(datamodule, random_base=str(config.output_dir / "base"))
    stop = GracefulStop()
    trainer = fit_trainer(
        keys,
        config.settings,
        module,
        seed=cast(int, config.config.seed_everything),
        output_dir=config.output_dir,
        tensorboard_dir=config.tensorboard_dir,
        total_steps=datamodule.plan.total_steps(keys["max_epochs"], keys["max_steps"]),
        resumed_step=resumed.step if resumed else 0,
        extra_callbacks=[stop, WriteConfig(config)],
    )
    refuse_several_ranks(trainer)
    print(run_plan(trainer, module, datamodule, config.output_dir, resumed), flush=True)
    trainer.fit(module, datamodule=datamodule, ckpt_path=resumed.path if resumed else None, weights_only=True)
    print(run_summary(config.output_dir, config.tensorboard_dir, config.settings.checkpoint), flush=True)
    if stop.received:
        print("stopped by SIGTERM; go on with the same command and --ckpt_path last", flush=True)
        raise SystemExit(128 + signal.SIGTERM)


def _check_monitor(monitor: str, datamodule: MFTDataModule) -> None:
    evaluated = [name for name in datamodule.task_names if name not in datamodule.exclude_tasks]
    each = [f"val/{kind}/{name}" for kind in ("loss", "perplexity", "accuracy") for name in evaluated]
    if monitor not in ("val/loss", *each):
        raise UserError(f"checkpoint.monitor: {monitor!r} is none of val/loss, {', '.join(each)}.")


def _resumed(config: RunConfig) -> CheckpointInfo | None:
    """The checkpoint to go on from, if any; refuses to mix two runs in one directory."""
    output_dir, checkpoint = config.output_dir, config.settings.checkpoint
    given: Any = config.config.ckpt_path
    if given is not None:
        resumed = resolve_checkpoint(given, output_dir, checkpoint.monitor, checkpoint.mode)
        if resumed is None:
            print(f"--ckpt_path last: no checkpoint in {output_dir} yet; starting at step 0.", flush=True)
        return resumed
    if _holds_run(output_dir):
        raise UserError(
            f"output_dir: {output_dir} holds a run already. Go on with it by --ckpt_path last, or start another one "
            "with --output_dir DIR."
        )
    return None


def _holds_run(directory: Path) -> bool:
    return bool(find_checkpoints(directory)) or any(
        (directory / name).exists() for name in ("config.yaml", "metrics.csv", "runs", "base")
    )
