"""Multi-task fine-tuning of GPT-NeoX language models as a PyTorch Lightning application."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mft_lightning.errors import UserError
    from mft_lightning.weighting.balancer import Balancer

__version__ = "0.1.0"
__all__ = ["Balancer", "UserError"]

# Where each name is, for whoever asks for it first: nothing of it is imported before.
_PLACES = {
    "Balancer": "mft_lightning.weighting.balancer",
    "UserError": "mft_lightning.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
