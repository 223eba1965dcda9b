"""What DeepSpeed's configuration may not decide; no DeepSpeed is needed to tell."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import MagicMock

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies import deepspeed as lightning_deepspeed

from mft_lightning.errors import NotYetError, UserError
from mft_lightning.training.zero import ZeroStrategy


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the constructor of Lightning's strategy looks."""
    monkeypatch.setitem(sys.modules, "deepspeed", MagicMock())
    monkeypatch.setattr(lightning_deepspeed, "_DEEPSPEED_GREATER_EQUAL_0_16", True)
    monkeypatch.setattr(lightning_deepspeed, "_DEEPSPEED_AVAILABLE", True)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"gradient_clipping": 1.0}, UserError, r"gradient_clipping is not decided there\. Use trainer\.gradient_clip"),
        ({"gradient_accumulation_steps": 2}, UserError, r"Use data\.gradient_accumulation_steps\."),
        ({"train_batch_size": 16}, UserError, r"Use data\.total_train_batch_size\."),
        ({"bf16": {"enabled": True}}, UserError, r"bf16 is not decided there\. Use trainer\.precision\."),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, UserError, "cpu_checkpointing has no effect"),
        ({"zero_optimization": {"stage": 3}}, NotYetError, "stage: 3 is not supported yet"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, NotYetError, "offload"),
        ({"optimizer": {"type": "Adam"}}, NotYetError, "optimizer"),
    ],
)
def test_what_a_run_decides_is_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ZeroStrategy(DeepSpeedStrategy(config={"zero_optimization": {"stage": 2}} | settings), ())


def test_lightnings_own_settings_are_taken() -> None:
    assert ZeroStrategy(DeepSpeedStrategy(stage=1), ("fit",)).command == ("fit",)
