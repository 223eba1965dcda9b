"""A reply is told word by word as the answer is, and can be stopped after any token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from mft_lightning.data.tokenizer import load_tokenizer
from mft_lightning.model.generation import Answer, GenerationSettings, answer
from mft_lightning.model.replying import reply

POSITIONS = 96
PROMPTS = [[5, 6, 7], [9] * 40, [300, 17, 8, 8], [400], [12] * (POSITIONS - 10), [33, 34], [101, 7, 90]]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    """Random, loud, with a bias that ends some answers."""
    config = AutoConfig.from_pretrained(tiny_model, max_position_embeddings=POSITIONS, initializer_range=0.4)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.bias[0] = 1.0
        model.get_output_embeddings().weight[0, 0] += 2.8
    return model


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model))


def told(model: Any, tokenizer: Any, prompt: list[int], stop_after: int = 1000, **settings: Any) -> tuple[Answer, str]:
    """The answer, stopped after so many tokens, and its text as it was told."""
    pieces: list[str] = []
    asked = iter(range(1, 2000))
    config = GenerationSettings(max_new_tokens=40, **settings)
    found = reply(model, tokenizer, prompt, config, tell=pieces.append, stopped=lambda: next(asked) >= stop_after)
    return found, "".join(pieces)


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "top_k": 50}, {"num_beams": 3}], ids=str)
def test_a_reply_is_the_answer_and_what_is_told_is_its_text(
    model: Any, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> None:
    expected = [answer(model, tokenizer, [p], GenerationSettings(max_new_tokens=40, **settings))[0] for p in PROMPTS]
    assert {found.finished for found in expected} == {True, False}
    for prompt, whole in zip(PROMPTS, expected, strict=True):
        found, text = told(model, tokenizer, prompt, **settings)
        assert found == whole
        assert text == tokenizer.decode(whole.ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_a_stopped_reply_is_the_beginning_of_the_answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], tokens: int
) -> None:
    for prompt in PROMPTS:
        whole, _ = told(model, tokenizer, prompt, **settings)
        found, text = told(model, tokenizer, prompt, stop_after=tokens, **settings)
        assert found.ids == whole.ids[:tokens] and found.finished == (whole.finished and len(whole.ids) < tokens)
        assert text == tokenizer.decode(found.ids, clean_up_tokenization_spaces=False)


def test_a_search_can_be_stopped_too(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    found, text = told(model, tokenizer, PROMPTS[0], stop_after=5, num_beams=3)
    assert 0 < len(found.ids) <= 5 and text == tokenizer.decode(found.ids, clean_up_tokenization_spaces=False)
