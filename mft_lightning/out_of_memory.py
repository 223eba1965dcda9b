"""What to say of a run that ran out of memory."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from traceback import walk_tb
from typing import Any

from mft_lightning.errors import first_line

_ON_A_CPU = "DefaultCPUAllocator: can't allocate memory"
_LOST_WORKER = re.compile(r"DataLoader worker \(pid.*?\) (is killed by signal|exited unexpectedly)")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left for a tensor."""
    torch: Any = sys.modules.get("torch")  # which raised it, if it is one
    if torch is None:
        return False
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and _ON_A_CPU in str(error))


def advice(error: BaseException, arguments: Sequence[str]) -> str:
    """The error in a line, the keys that need less memory, and the command that tells how much less.

    Args:
        error: of :func:`is_out_of_memory`.
        arguments: of the command that ran out of memory.
    """
    said = _said(error)
    command = shlex.join(["python", "-m", "mft_lightning", "estimate", *arguments])
    return (
        f"out of memory: {said}. Needs less and learns the same: model.checkpoint_activations: true, a smaller "
        "data.per_device_train_batch_size (in a validation data.per_device_valid_batch_size), trainer.strategy: fsdp "
        "on several devices. Needs less: a smaller data.seq_length, model.peft_type: lora, or trainer.precision: "
        f"bf16-true. How much less: {command}"
    )


def answering_advice(error: BaseException, command: str) -> str:
    """The error in a line, and what answers with less memory.

    Args:
        error: of :func:`is_out_of_memory`.
        command: the one that answers.
    """
    less = {
        "generate": "a smaller --batch_size, fewer --num_beams, --dtype bfloat16",
        "predict": "a smaller --batch_size, fewer --num_beams, trainer.precision: bf16-true, trainer.strategy: fsdp on "
        "several devices",
    }.get(command, "--dtype bfloat16, fewer --num_beams")
    return f"out of memory: {_said(error)}. Needs less: {less}, or fewer --max_new_tokens."


def _said(error: BaseException) -> str:
    said = re.sub(r"^\[enforce fail .*?(?=DefaultCPUAllocator)", "", first_line(error))
    return said.partition(" Of the allocated memory")[0].rstrip(".")


def is_lost_worker(error: BaseException) -> bool:
    """Whether an error says that a data loader's process is gone; one that failed by itself tells of its own error.

    Or it was gone when a batch that it had announced was fetched from it.
    """
    if isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):
        files = (frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__))
        return any(file.endswith("resource_sharer.py") for file in files)
    return isinstance(error, RuntimeError) and _LOST_WORKER.match(str(error)) is not None


def worker_advice(error: BaseException) -> str:
    """The error in a line, and what loads data with less memory.

    Args:
        error: of :func:`is_lost_worker`.
    """
    said = first_line(error).rstrip(".")
    return (
        f"a process that loads data is gone ({said}). Where nothing above says why, the system "
        "has ended it, because the host's memory or /dev/shm is full. Fewer data.num_workers need less, 0 none of "
        "/dev/shm; a container gets more of it with docker's --shm-size."
    )
