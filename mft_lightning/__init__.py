"""Multi-task fine-tuning of GPT-NeoX language models as a PyTorch Lightning application."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mft_lightning.data.datamodule import MFTDataModule
    from mft_lightning.errors import UserError
    from mft_lightning.model.module import MFTModule
    from mft_lightning.model.settings import LoraSettings, QLoraSettings
    from mft_lightning.notebook import Trainer
    from mft_lightning.training.callbacks import EarlyStoppingSettings
    from mft_lightning.training.checkpoint import CheckpointSettings
    from mft_lightning.training.evaluation import EvaluationSettings
    from mft_lightning.weighting.balancer import Balancer
    from mft_lightning.weighting.coba import CobaSettings
    from mft_lightning.weighting.famo import FamoSettings

__version__ = "0.1.0"
__all__ = [
    "Balancer",
    "CheckpointSettings",
    "CobaSettings",
    "EarlyStoppingSettings",
    "EvaluationSettings",
    "FamoSettings",
    "LoraSettings",
    "MFTDataModule",
    "MFTModule",
    "QLoraSettings",
    "Trainer",
    "UserError",
]

# Where each name is, for whoever asks for it first: a command that needs none imports none.
_PLACES = {
    "Balancer": "weighting.balancer",
    "CheckpointSettings": "training.checkpoint",
    "CobaSettings": "weighting.coba",
    "EarlyStoppingSettings": "training.callbacks",
    "EvaluationSettings": "training.evaluation",
    "FamoSettings": "weighting.famo",
    "LoraSettings": "model.settings",
    "MFTDataModule": "data.datamodule",
    "MFTModule": "model.module",
    "QLoraSettings": "model.settings",
    "Trainer": "notebook",
    "UserError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
