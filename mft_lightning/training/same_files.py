"""Whether the hosts of a run see the same files, where they must."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from mft_lightning import ranks
from mft_lightning.errors import UserError
from mft_lightning.training.run_lock import LOCK


def check_same_files(output_dir: Path, resumed_step: int, *, sharded: bool) -> None:
    """Refuse a run whose ranks would not go on from the same step, or not write parts of the same checkpoints.

    Every rank must ask, while the first has its lock in ``output_dir``.

    Args:
        output_dir: of the run.
        resumed_step: of the checkpoint that this rank has found; 0 for none.
        sharded: whether every rank writes its own part of a checkpoint.

    Raises:
        UserError: this rank found another checkpoint than some other, or does not see the first one's directory.
    """
    host, step = socket.gethostname(), ranks.highest(resumed_step)
    if resumed_step != step:
        raise UserError(
            f"--ckpt_path: the host {host} would begin at step {resumed_step}, another at step {step}: they do not see "
            "the same checkpoints. Let all hosts see the same files, or put the checkpoint on each of them."
        )
    if sharded and not _is_seen(output_dir / LOCK):
        raise UserError(
            f"checkpoint.sharded: the host {host} does not see {output_dir} of the first rank, where every rank writes "
            "its part. Give an output_dir that all hosts see, or save without it."
        )


def _is_seen(file: Path) -> bool:
    # NFS asks anew when directories are opened, and else remembers for a while what was not there.
    for directory in reversed(file.parents):
        with suppress(OSError):
            os.close(os.open(directory, os.O_RDONLY))
    return file.exists()
