"""Casting a model without the buffers that no checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def unsaved_buffers_kept(module: nn.Module) -> Iterator[None]:
    """What casts or moves all tensors in the block leaves the buffers that no checkpoint holds in their dtype.

    They are the frequencies of the rotary positions, which transformers has in float32 whatever the weights' dtype.
    Rounded, as by ``module.to(torch.bfloat16)``, they make another model than the one that is saved and loaded.
    """
    exact = {
        (owner, name): buffer
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and name in owner._non_persistent_buffers_set
    }
    yield
    for (owner, name), buffer in exact.items():
        now = owner._buffers[name]
        if now is not None and now.dtype != buffer.dtype:
            owner._buffers[name] = buffer.to(now.device)
