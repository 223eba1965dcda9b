"""How a contender's process takes one optimizer step at a time; runs in every contender's own environment.

At the start of every step the process writes a line of JSON behind ``MARK`` and waits for a line. So whatever a step
takes, from the first row it sees to the next one's, lies between the line it was given and the line it writes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

MARK = "@paused "


class Gate:
    """Stands at the start of every step.

    Args:
        device: "cpu" or "cuda", whose work is waited for and whose memory is told.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.loss: Any = None  # of the step that was let through last, a number or a tensor of one
        self._since: float | None = None

    def add(self, loss: Any) -> None:
        """Add a micro-batch's share to the loss of the step."""
        self.loss = loss if self.loss is None else self.loss + loss

    def pause(self) -> None:
        """Tell of the step that ended here, and wait to be let into the next."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = None if self._since is None else time.perf_counter() - self._since
        loss, self.loss = self.loss, None
        tell(seconds=seconds, loss=None if loss is None else float(loss), peak=peak_memory(self.device))
        self._since = time.perf_counter()


def tell(**values: Any) -> None:
    """Write values, and wait for a line; without one, end here and now, so that nothing more is computed or saved."""
    print(MARK + json.dumps(values), flush=True)
    if not sys.stdin.readline():
        os._exit(0)


def peak_memory(device: str) -> int:
    """Bytes: the most that this process ever had resident, or of a GPU, that its tensors had."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
