"""What to say of a run that ran out of memory."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from mft_lightning.errors import first_line

_ON_A_CPU = "DefaultCPUAllocator: can't allocate memory"


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
    said = re.sub(r"^\[enforce fail .*?(?=DefaultCPUAllocator)", "", first_line(error))
    said = said.partition(" Of the allocated memory")[0].rstrip(".")
    command = shlex.join(["python", "-m", "mft_lightning", "estimate", *arguments])
    return (
        f"out of memory: {said}. Needs less and learns the same: model.checkpoint_activations: true, a smaller "
        "data.per_device_train_batch_size (in a validation data.per_device_valid_batch_size), trainer.strategy: fsdp "
        "on several devices. Needs less: a smaller data.seq_length, model.peft_type: lora, or trainer.precision: "
        f"bf16-true. How much less: {command}"
    )
