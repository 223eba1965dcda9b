"""Memory for a chunk of logits that lasts from one step to the next."""

from __future__ import annotations

from torch import Tensor

MAPPED_ANEW = 32 * 2**20  # bytes from which on glibc asks the system for every block, and gives it back (mallopt(3))


class LogitBuffer:
    """Memory for logits, kept where it would otherwise be mapped anew in every step.

    The system clears what it maps page by page, which takes a CPU half as long as to multiply what is written there
    (docs/speed.md). Other devices' allocators keep their blocks themselves.
    """

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def of(self, inputs: Tensor, width: int) -> Tensor:
        """Room for ``width`` logits of each row of inputs, in their type; what was handed out before is overwritten."""
        count = len(inputs) * width
        if inputs.device.type != "cpu" or count * inputs.itemsize < MAPPED_ANEW:
            return inputs.new_empty(len(inputs), width)
        if self._kept is None or self._kept.dtype != inputs.dtype or len(self._kept) < count:
            self._kept = None  # before there is another
            self._kept = inputs.new_empty(count)
        return self._kept[:count].view(len(inputs), width)
