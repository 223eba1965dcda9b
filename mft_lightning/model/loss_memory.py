"""What a head and its loss need of a device, beside the head's inputs and their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mft_lightning.model.head_loss import ROWS_WITHOUT_WEIGHT, cached_rows
from mft_lightning.model.logit_buffer import MAPPED_ANEW
from mft_lightning.model.product_dtype import computes_bfloat16
from mft_lightning.model.supervised_loss import LOGIT_BUDGET, LOGIT_BUDGETS


@dataclass(frozen=True)
class LossMemory:
    """Bytes that a head's loss takes.

    Attributes:
        head: as it is on one device.
        tokens: supervised ones of a micro-batch.
        device: "cpu" or "cuda".
        product: bytes of a number in matrix products.
        used: bytes of a number of the head's weight as it is seen.
        keep_logits: whether memory for logits lasts from step to step, where that is faster.
    """

    head: Any
    tokens: int
    device: str
    product: int
    used: int
    keep_logits: bool

    def kept(self) -> int:
        """Memory for logits that lasts from step to step."""
        size = self._rows * self.head.out_features * self._computed
        return size if self.keep_logits and self.device == "cpu" and self._plain and size >= MAPPED_ANEW else 0

    def beside_kept(self) -> int:
        """A chunk of logits, what becomes of them, and the head's gradient, at their most."""
        vocabulary, hidden = self.head.out_features, self.head.in_features
        computed, rows, reduced = self._computed, self._rows, max(self._computed, 4)
        half = computed if computed < reduced else 0  # what exists in both precisions for a moment
        if not self._plain:  # with an adapter: logits, their log-softmax and gradient
            return rows * vocabulary * (3 * reduced + half)
        matrix = vocabulary * hidden
        cast = matrix * computed if computed != self.used else 0
        piece = min(rows, cached_rows(self.device, vocabulary)) * vocabulary * reduced
        chunk = rows * (vocabulary + hidden) * computed - self.kept() + (2 if half else 1) * piece
        made = 0  # of the head's gradient
        if self._trains and rows == self.tokens:
            made = matrix * (computed + (self.used if computed != self.used else 0))
        elif self._trains:  # the sum, and a product of another type before it is added
            made = matrix * (reduced + half)
        return cast + chunk + made

    @property
    def _plain(self) -> bool:
        return type(self.head) is nn.Linear

    @property
    def _trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.head.parameters())

    @property
    def _computed(self) -> int:
        """Bytes of a logit as it is computed."""
        slow = self.device == "cpu" and self.product == 2 and not computes_bfloat16()
        return 4 if slow else self.product

    @property
    def _rows(self) -> int:
        """Tokens of a chunk."""
        rows = LOGIT_BUDGETS.get(self.device, LOGIT_BUDGET) // (self._computed * self.head.out_features)
        if self.device == "cpu" and self._computed == 2 and not self._trains:
            rows = min(rows, ROWS_WITHOUT_WEIGHT)
        return max(1, min(self.tokens, rows))
