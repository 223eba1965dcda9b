"""Where a run goes on from, and what becomes of what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mft_lightning.commands.report import SKIPPED
from mft_lightning.errors import UserError
from mft_lightning.screen import shown
from mft_lightning.training.checkpoint_choice import find_checkpoints, resolve_checkpoint
from mft_lightning.training.checkpoint_dirs import CheckpointInfo, is_named
from mft_lightning.training.checkpoint_io import HFCheckpointIO
from mft_lightning.training.retention import SUPERSEDED
from mft_lightning.training.run import Run
from mft_lightning.training.same_run import LOST, check_same_run, set_position


def resumed_checkpoint(config: Run) -> CheckpointInfo | None:
    """The checkpoint to go on from, if any; refuses to mix two runs in one directory."""
    output_dir, checkpoint = config.output_dir, config.settings.checkpoint
    given: Any = config.ckpt_path
    resumed = None
    if given is not None:
        resumed = resolve_checkpoint(given, output_dir, checkpoint.monitor, checkpoint.mode, to_resume=True)
        if resumed is None:
            print(f"--ckpt_path last: no checkpoint in {output_dir} yet; starting at step 0.", flush=True)
        if resumed is None and _holds_run(output_dir):  # one that was killed before its first checkpoint
            return None
        if resumed is not None and resumed.path.resolve().parent == output_dir.resolve():
            return resumed
        if resumed is not None and resumed.path.resolve().parent == (output_dir / SUPERSEDED).resolve():
            raise UserError(
                f"--ckpt_path: {shown(resumed.path)} was superseded: the run in {shown(output_dir)} and its curves "
                "went another way. Go on from it with --output_dir DIR."
            )
    if _holds_run(output_dir):
        raise UserError(
            f"output_dir: {output_dir} holds a run already. Go on with it by --ckpt_path last, or start another one "
            "with --output_dir DIR."
        )
    if any(config.tensorboard_dir.glob("events.out.tfevents.*")):
        raise UserError(f"tensorboard_dir: {config.tensorboard_dir} holds another run's curves. Give another one.")
    return resumed


def _holds_run(directory: Path) -> bool:
    names = ("config.yaml", "metrics.csv", SKIPPED, "runs", "base")
    return any((directory / name).exists() for name in names) or any(map(is_named, directory.glob("step-*")))


def load_resumed(checkpoint_io: HFCheckpointIO, path: Path, config: Run) -> list[str]:
    """Load the checkpoint to go on from, if it is of this run, or may be of another; what to say of that."""
    module, datamodule = config.model, config.datamodule
    may_change = datamodule.fingerprint.keys() if config.settings.checkpoint.allow_changes else ()
    # told before its weights are found to have other rows
    check_same_run(path, {"data.role_tokens": datamodule.role_tokens}, may_change)
    checkpoint = checkpoint_io.preload(path)
    try:
        changes = check_same_run(path, module.fingerprint(datamodule), may_change)
    except UserError as error:
        if may_change:
            raise
        check_same_run(path, {**module.description, **module.grouping})
        raise UserError(f"{error} Or go on regardless with --checkpoint.allow_changes true. {LOST}") from error
    if not changes:
        return []
    set_position(checkpoint, datamodule.plan.steps_per_epoch)
    return [f"note: goes on although {'; '.join(changes)}. {LOST}", ""]


def settle(config: Run, resumed: CheckpointInfo) -> None:
    """Do what a process that was killed right after its last save had still to do; remove nothing by other settings."""
    settings, directory = config.settings, config.output_dir
    names = ("save_total_limit", "trainer_state", "monitor", "mode")
    file = directory / "config.yaml"
    saved = yaml.safe_load(file.read_text(encoding="utf-8"))["checkpoint"] if file.is_file() else {}
    same = all(saved.get(name, ...) == getattr(settings.checkpoint, name) for name in names)
    if same and find_checkpoints(directory)[-1:] == [resumed]:
        settings.checkpoint.retention(directory, validated=settings.evaluation.enabled).settle()
