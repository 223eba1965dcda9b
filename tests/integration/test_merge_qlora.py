"""A QLoRA adapter is merged into either base, and the command tells how far the choice is from what was trained."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from mft_lightning.cli import main
from mft_lightning.commands.logit_difference import PROMPTS
from tests.integration.conftest import same_weights

CONFIGS = {
    "4": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(scope="module", params=CONFIGS)
def bits(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def adapter(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, bits: str) -> Path:
    words = ("--trainer.max_steps", "3", "--evaluation.strategy", "none", "--model.learning_rate", "0.1")
    run = fit(tmp_path_factory.mktemp("qlora"), *words, "--model.qlora.bits", bits, config="qlora.yaml")
    return run / "step-00000003"


def opened(adapter: Path, bits: str | None) -> torch.nn.Module:
    """As a stranger opens it, on a base that is quantised or not."""
    options: dict[str, Any] = {} if bits is None else {"quantization_config": CONFIGS[bits], "device_map": {"": "cpu"}}
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base", dtype=torch.float32, **options)
    model = PeftModel.from_pretrained(base, adapter).eval()
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # else it rounds its scales
            layer.support_avx512bf16_for_cpu = False
        if isinstance(layer, Linear8bitLt):  # else it rounds what comes in too
            layer.training = True
    return model


def logits(model: torch.nn.Module, adapter: Path) -> torch.Tensor:
    """Of the prompts that the command measures with."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    found = []
    for prompt in PROMPTS:
        turns = [{"role": "human", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        with torch.no_grad():
            found.append(model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0])
    return torch.cat(found)


def merged(adapter: Path, output: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[float, float]:
    """The largest and the mean difference that the command tells of."""
    capsys.readouterr()
    assert main(["merge", "--adapter", str(adapter), "--output", str(output), *words]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    told = re.fullmatch(
        r"its logits are (\S+) at most and (\S+) on average from those of the quantised base \+ adapter, "
        r"at (\d+) positions of 3 prompts",
        last,
    )
    assert told is not None, last
    return float(told[1]), float(told[2])


@pytest.mark.parametrize("into", ["base", "quantized-base"])
def test_it_merges_into_either_base_and_measures_the_difference(
    adapter: Path, bits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], into: str
) -> None:
    output = tmp_path / "merged"
    largest, mean = merged(adapter, output, capsys, "--merge-into", into)
    trained = logits(opened(adapter, bits), adapter)
    ours = logits(AutoModelForCausalLM.from_pretrained(output).eval(), adapter)
    apart = (ours - trained).abs()
    if into == "base":
        whole: Any = opened(adapter, None)
        assert torch.allclose(ours, logits(whole, adapter), rtol=1e-5, atol=1e-5)
        whole.merge_and_unload().save_pretrained(tmp_path / "theirs")
        assert same_weights(output, tmp_path / "theirs")
        assert largest > 1e-3
    else:
        assert largest < 1e-5
    assert largest == pytest.approx(float(apart.max()), rel=0.1, abs=1e-6)
    assert mean == pytest.approx(float(apart.mean()), rel=0.1, abs=1e-6)


def test_without_bitsandbytes_it_merges_into_the_base_and_says_what_to_install_for_the_rest(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mft_lightning.model.quantized.find_spec", lambda name: None)
    asked = ["merge", "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    capsys.readouterr()
    assert main([*asked, "--merge-into", "quantized-base"]) == 1
    needs = 'needs bitsandbytes, which is not installed. Install it with pip install -e ".[qlora]"'
    assert f"error: --merge-into quantized-base: {needs}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(asked) == 0
    printed = capsys.readouterr()
    assert "merged model: " in printed.out and "was not measured" in printed.err and needs in printed.err


def test_an_adapter_of_a_whole_base_has_no_other_to_be_merged_into(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--trainer.max_steps", "1", "--evaluation.strategy", "none")
    adapter = fit(tmp_path / "run", *words, config="lora.yaml") / "step-00000001"
    asked = ["merge", "--adapter", str(adapter), "--output", str(tmp_path / "merged"), "--merge-into"]
    capsys.readouterr()
    assert main([*asked, "quantized-base"]) == 1
    assert f"{adapter} does not say that it was trained on one" in capsys.readouterr().err
    assert main([*asked, "bass"]) == 1
    assert "--merge-into: 'bass' is none of base, quantized-base" in capsys.readouterr().err
