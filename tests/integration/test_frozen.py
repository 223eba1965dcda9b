"""Runs in mixed precision whose frozen weights are held in half precision, as plain autocast has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mft_lightning.model.module import MFTModule
from mft_lightning.model.product_dtype import computes_bfloat16
from tests.integration.conftest import metrics, same_weights, weights

KEEP = ("--checkpoint.save_total_limit", "null", "--data.per_device_train_batch_size", "4")
ASKED = ("--evaluation.exact_match_per_task", "1")


@pytest.mark.skipif(not computes_bfloat16(), reason="this CPU has no instructions for bfloat16")
@pytest.mark.parametrize(
    "more", [("--model.lora.dropout", "0.1"), ("--model.lora.dropout", "0", "--model.lora.init", "pissa")]
)
def test_steps_validations_and_answers_are_plain_autocasts_to_the_bit(
    fit: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    words = (*KEEP, *ASKED, "--trainer.precision", "bf16-mixed", "--trainer.max_steps", "6", *more)
    kinds: set[torch.dtype] = set()
    begin = MFTModule.on_train_start

    def noting(module: MFTModule) -> None:
        kinds.update(parameter.dtype for parameter in module.parameters())
        begin(module)

    monkeypatch.setattr(MFTModule, "on_train_start", noting)
    held = fit(tmp_path / "held", *words, config="lora.yaml")
    assert kinds == {torch.float32, torch.bfloat16}
    resumed = fit(tmp_path / "resumed", *words, "--ckpt_path", str(held / "step-00000004"), config="lora.yaml")
    kinds.clear()
    monkeypatch.setattr("mft_lightning.model.module.hold_as_multiplied", lambda *_: None)
    plain = fit(tmp_path / "plain", *words, config="lora.yaml")
    assert kinds == {torch.float32}
    assert metrics(held) == metrics(plain)
    for step in ("step-00000004", "step-00000006"):
        assert same_weights(held / step, plain / step)
    assert same_weights(resumed / "step-00000006", plain / "step-00000006")
    assert same_weights(held / "base", plain / "base")
    assert {tensor.dtype for tensor in weights(held / "base").values()} == {torch.float32}
