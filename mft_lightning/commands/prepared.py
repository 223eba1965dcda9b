"""What ``validate``, ``test`` and ``predict`` do before they measure: find the checkpoint, and build its model."""

from __future__ import annotations

from mft_lightning.errors import UserError
from mft_lightning.screen import say
from mft_lightning.training.checkpoint_choice import resolve_checkpoint
from mft_lightning.training.checkpoint_dirs import CheckpointInfo
from mft_lightning.training.checkpoint_io import HFCheckpointIO
from mft_lightning.training.run import Run
from mft_lightning.training.same_run import check_same_run, check_start


def named_checkpoint(config: Run) -> CheckpointInfo | None:
    """The checkpoint of ``--ckpt_path``; None where none is asked for.

    Raises:
        UserError: there is none of that name.
    """
    if config.ckpt_path is None:
        return None
    settings = config.settings.checkpoint
    checkpoint = resolve_checkpoint(config.ckpt_path, config.output_dir, settings.monitor, settings.mode)
    if checkpoint is None:
        raise UserError(f"--ckpt_path last: no checkpoint in {config.output_dir}.")
    return checkpoint


def build_for(config: Run, checkpoint: CheckpointInfo | None) -> HFCheckpointIO:
    """Build the network, and load the checkpoint ahead, if it is one of such a network; say what it starts from else.

    Raises:
        UserError: it is not, or cannot be loaded.
    """
    module = config.model
    module.build(config.datamodule, random_base=str(config.output_dir / "base"), sketched=config.sharded)
    checkpoint_io = HFCheckpointIO(module)
    if checkpoint is None:
        say(*check_start(module, config.datamodule.role_tokens))
    else:
        check_same_run(checkpoint.path, {"data.role_tokens": config.datamodule.role_tokens})
        checkpoint_io.preload(checkpoint.path)
        check_same_run(checkpoint.path, module.description)
    return checkpoint_io
