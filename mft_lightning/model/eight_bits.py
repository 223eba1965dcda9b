"""A linear layer whose weight has 8 bits, and whose products are taken with the weight brought back.

Imported only where it is asked for.
"""

from __future__ import annotations

from typing import cast

from bitsandbytes.autograd._functions import MatMul8bitFp
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor


class WeightOnlyLinear8bit(Linear8bitLt):
    """``Linear8bitLt`` that computes in evaluation, and on every device, as bitsandbytes trains it on a CPU.

    LLM.int8 rounds what comes into a layer too, all but the columns that have an outlier in some row; so a row's
    product depends on the rows beside it: an answer on its batch, a conversation on those it is packed with.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return cast(Tensor, MatMul8bitFp.apply(x, self.weight, None, bias, self.state))
