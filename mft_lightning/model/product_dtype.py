"""The type in which matrix products of hidden states are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(states: Tensor) -> torch.dtype:
    """By autocast, or that of the states; float32 in place of bfloat16 on a CPU that would be slow at it."""
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    return torch.float32 if kind == "cpu" and dtype == torch.bfloat16 and not computes_bfloat16() else dtype


def computes_bfloat16() -> bool:
    """Whether this CPU has instructions for it; matrix products are some thirty times slower than float32's if not."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
