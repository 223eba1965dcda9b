"""Configurations of adapters that others saved."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from peft import LoraConfig

from mft_lightning.model.saved_adapter import peft_config

WRITTEN = {"peft_type": "LORA", "task_type": "ANT_CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["dense"]}


def saved(directory: Path, **changed: object) -> Path:
    (directory / "adapter_config.json").write_text(json.dumps({**WRITTEN, **changed}))
    return directory


def test_fields_of_the_first_versions_of_peft_that_ask_for_nothing_are_passed_over(tmp_path: Path) -> None:
    old = saved(tmp_path, enable_lora=None, merge_weights=False, fan_in_fan_out=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = peft_config(old)
    assert isinstance(config, LoraConfig) and (config.r, config.task_type) == (4, "CAUSAL_LM")


def test_a_field_that_asks_for_something_and_is_not_known_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="enable_lora"):
        peft_config(saved(tmp_path, enable_lora=[True, False, True]))


@pytest.mark.parametrize("kind", ["ROEM", None, "lora"])
def test_a_kind_of_adapter_that_there_is_not(tmp_path: Path, kind: str | None) -> None:
    with pytest.raises(ValueError, match=f"peft_type: {kind!r} is no kind of adapter that peft knows"):
        peft_config(saved(tmp_path, peft_type=kind))
