"""An answer out of a batch is the answer alone, and both are what transformers' own ``generate`` gives."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from mft_lightning.data.tokenizer import load_tokenizer
from mft_lightning.errors import UserError
from mft_lightning.model.drawing import conversation_seed, drawn_alone
from mft_lightning.model.generation import PRESETS, Answer, GenerationSettings, answer

EOS, POSITIONS = 0, 96
DRAW = random.Random(1)
LENGTHS = (3, 41, 17, 1, 30, 8, 60, 25, 2, 50)
PROMPTS = [[DRAW.randrange(2, 512) for _ in range(length)] for length in LENGTHS]
PROMPTS.append([9, 8, EOS, 7, EOS, 6])  # a history with answers
HOSTILE: dict[str, Any] = {
    "do_sample": True,
    "temperature": 9.0,
    "top_k": 3,
    "top_p": 0.5,
    "num_beams": 4,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(EOS, 300)),
    "min_new_tokens": 20,
    "max_new_tokens": 21,
    "eos_token_id": 301,
    "pad_token_id": 302,
    "length_penalty": -2.0,
    "return_dict_in_generate": True,
    "use_cache": False,
}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    """Random, loud enough that answers depend on the whole prompt, with a bias that ends some of them.

    In float64, so that a batch's rounding does not decide between two tokens.
    """
    config = AutoConfig.from_pretrained(tiny_model, max_position_embeddings=POSITIONS, initializer_range=0.4)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.bias[0] = 1.0
        model.get_output_embeddings().weight[EOS, 0] += 2.8
    return model


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model))


@pytest.fixture
def peft_model(model: Any) -> Iterator[PeftModel]:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False).double().eval()
    yield wrapped
    wrapped.unload()


def by_transformers(model: Any, prompt: list[int], limit: int = 24, **settings: Any) -> Answer:
    """One prompt, asked of ``generate`` directly."""
    ids = torch.tensor([prompt])
    asked = {"do_sample": False, "eos_token_id": EOS, "pad_token_id": EOS, **settings}
    limit = min(limit, POSITIONS - len(prompt))
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, **asked)
    found = output[0, len(prompt) :].tolist()
    return Answer(found[: found.index(EOS)], True) if EOS in found else Answer(found, False)


def asked(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], **settings: Any) -> list[Answer]:
    return answer(model, tokenizer, prompts, GenerationSettings(**{"max_new_tokens": 24, **settings}))


def test_the_prompts_lead_to_answers_of_every_kind(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Or the tests below would compare little."""
    answers = asked(model, tokenizer, PROMPTS)
    assert {found.finished for found in answers} == {True, False}
    assert len({len(found.ids) for found in answers}) > 3
    assert sum(len(set(found.ids)) > 10 for found in answers) > 3
    assert any(found.finished and found.ids for found in answers)


@pytest.mark.parametrize(
    ("settings", "pad"),
    [
        ({}, "<|padding|>"),
        ({}, "<|endoftext|>"),
        ({"repetition_penalty": 1.6}, "<|padding|>"),
        ({"repetition_penalty": 1.6}, "<|endoftext|>"),
        ({"repetition_penalty": 0.7}, "<|endoftext|>"),
        ({"num_beams": 3}, "<|padding|>"),
        ({"num_beams": 2, "repetition_penalty": 1.3}, "<|endoftext|>"),
    ],
    ids=str,
)
def test_a_batch_answers_as_transformers_does_one_by_one(
    model: Any, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], pad: str
) -> None:
    tokenizer.pad_token = pad
    expected = [by_transformers(model, prompt, **settings) for prompt in PROMPTS]
    assert [asked(model, tokenizer, [prompt], **settings)[0] for prompt in PROMPTS] == expected
    assert asked(model, tokenizer, PROMPTS, **settings) == expected
    assert asked(model, tokenizer, PROMPTS[::-1], **settings) == expected[::-1]
    if settings:
        assert expected != [by_transformers(model, prompt) for prompt in PROMPTS]


@given(
    prompts=st.lists(st.lists(st.integers(2, 511), min_size=1, max_size=40), min_size=2, max_size=4),
    penalty=st.sampled_from([1.0, 1.5]),
    beams=st.sampled_from([1, 2]),
)
@settings(deadline=None, max_examples=12, derandomize=True)
def test_any_prompts_answer_in_a_batch_as_alone(
    model: Any, tiny_model: Path, prompts: list[list[int]], penalty: float, beams: int
) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    how = {"max_new_tokens": 8, "repetition_penalty": penalty, "num_beams": beams}
    alone = [asked(model, tokenizer, [prompt], **how)[0] for prompt in prompts]
    assert asked(model, tokenizer, prompts, **how) == alone


def test_an_answer_is_cut_at_its_eos_and_unfinished_at_the_limit(
    model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = asked(model, tokenizer, PROMPTS, max_new_tokens=30)
    assert all(EOS not in found.ids and (found.finished or len(found.ids) == 30) for found in whole)
    for prompt, found in zip(PROMPTS, whole, strict=True):
        if found.finished:
            exactly = len(found.ids) + 1
            assert asked(model, tokenizer, [prompt], max_new_tokens=exactly) == [found]
            if found.ids:
                short = asked(model, tokenizer, [prompt], max_new_tokens=exactly - 1)
                assert short == [Answer(found.ids, False)]
        else:
            assert asked(model, tokenizer, [prompt], max_new_tokens=7) == [Answer(found.ids[:7], False)]


def test_the_token_that_ends_an_answer_is_the_tokenizers(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    unfinished = next(p for p in PROMPTS if not by_transformers(model, p).finished)
    ids = by_transformers(model, unfinished).ids
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[5])
    assert asked(model, tokenizer, [unfinished]) == [Answer(ids[: ids.index(ids[5])], True)]


def drawn(count: int, seed: int = 2) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(2, 512) for _ in range(count)]


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.6}], ids=str)
def test_a_prompt_near_the_last_position_takes_nothing_from_those_beside_it(
    model: Any, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> None:
    short, room = [drawn(3 * i + 1, seed=i) for i in range(12)], (1, 2, 5)
    prompts = [*short, *(drawn(POSITIONS - left) for left in room)]
    expected = [by_transformers(model, prompt, **settings) for prompt in prompts]
    found = asked(model, tokenizer, prompts, **settings)
    assert max(len(a.ids) for a in found[: len(short)]) == 24
    assert all(len(a.ids) <= left for a, left in zip(found[len(short) :], room, strict=True))
    assert any(not a.finished and len(a.ids) == left for a, left in zip(found[len(short) :], room, strict=True))
    assert found == expected


def test_nor_does_it_where_beams_are_followed(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [*(drawn(i + 1, seed=i) for i in range(24)), drawn(POSITIONS - 5)]
    expected = [by_transformers(model, prompt, num_beams=3) for prompt in prompts]
    assert asked(model, tokenizer, prompts, num_beams=3) == expected


def test_a_model_without_an_end_of_positions_answers_to_the_limit(
    model: Any, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = next(p for p in PROMPTS if not by_transformers(model, p).finished)
    monkeypatch.setattr(model.config, "max_position_embeddings", len(full) + 3)
    assert len(asked(model, tokenizer, [full])[0].ids) == 3
    monkeypatch.delattr(model.config, "max_position_embeddings")
    assert len(asked(model, tokenizer, [full])[0].ids) == 24


# --- the model's own generation config


def own_configs(model: Any) -> list[GenerationConfig]:
    base = [model.get_base_model().generation_config] if isinstance(model, PeftModel) else []
    return [model.generation_config, *base]


@pytest.mark.parametrize("kind", ["model", "peft_model"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"temperature": 1.0, "top_k": 20}], ids=str)
def test_the_models_own_generation_config_has_no_say_and_stays(
    kind: str, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    base = model.get_base_model() if kind == "peft_model" else model
    before = base.generation_config
    torch.manual_seed(0)
    expected = asked(model, tokenizer, PROMPTS, **settings)
    assert base.generation_config is before
    hostile = GenerationConfig(**HOSTILE)
    kept = hostile.to_dict()
    try:
        base.generation_config = hostile
        if kind == "peft_model":
            model.generation_config = hostile
        torch.manual_seed(0)
        assert asked(model, tokenizer, PROMPTS, **settings) == expected
        assert all(config is hostile for config in own_configs(model))
        assert hostile.to_dict() == kept
    finally:
        base.generation_config = before


def test_a_peft_model_and_its_base_may_have_a_config_each(
    peft_model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = peft_model.get_base_model()
    own = base.generation_config
    mine, theirs = GenerationConfig(**HOSTILE), GenerationConfig(max_new_tokens=1)
    peft_model.generation_config, base.generation_config = mine, theirs
    try:
        assert any(len(found.ids) == 24 for found in asked(peft_model, tokenizer, PROMPTS))
        assert peft_model.generation_config is mine and base.generation_config is theirs
    finally:
        base.generation_config = own


def test_an_adapter_answers_otherwise_than_its_base_and_as_transformers_does(
    peft_model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = [by_transformers(peft_model, prompt) for prompt in PROMPTS]
    assert asked(peft_model, tokenizer, PROMPTS) == expected
    with peft_model.disable_adapter():
        assert asked(peft_model, tokenizer, PROMPTS) != expected


@pytest.mark.parametrize("kind", ["model", "peft_model"])
def test_the_models_own_generation_config_comes_back_after_an_error(
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = request.getfixturevalue(kind)
    base = model.get_base_model() if kind == "peft_model" else model
    before = own_configs(model)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(base, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        asked(model, tokenizer, PROMPTS)
    assert all(now is then for now, then in zip(own_configs(model), before, strict=True))


# --- drawing


DRAWN: dict[str, Any] = {"temperature": 2.0, "top_p": 0.9, "top_k": 40}


def drawn_by_transformers(model: Any, prompt: list[int], seed: int, **settings: Any) -> Answer:
    """What transformers draws for a conversation that is alone, from its own seed on."""
    torch.manual_seed(conversation_seed(seed, prompt))
    return by_transformers(model, prompt, do_sample=True, **settings)


@pytest.mark.parametrize(
    "settings",
    [DRAWN, {"temperature": 1.0, "top_k": 0}, {"temperature": 1.7, "top_k": 0, "repetition_penalty": 1.4}],
    ids=str,
)
def test_a_batch_draws_for_each_what_transformers_draws_for_it_alone(
    model: Any, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> None:
    """One of the batch has only a few positions left, so that the others are asked again from the start."""
    prompts = [*PROMPTS, drawn(POSITIONS - 5)]
    expected = [drawn_by_transformers(model, prompt, 3, **settings) for prompt in prompts]
    found = asked(model, tokenizer, prompts, seed=3, **settings)
    assert found == expected and {answer.finished for answer in found} == {True, False}
    assert asked(model, tokenizer, prompts[::-1], seed=3, **settings) == expected[::-1]
    other = asked(model, tokenizer, prompts, seed=4, **settings)
    assert sum(ours != theirs for ours, theirs in zip(found, other, strict=True)) > len(prompts) // 2


def test_draws_follow_the_distribution(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """The first token of a thousand seeds, against the model's own probabilities among the five likeliest."""
    prompt, seeds = PROMPTS[1], range(1000)
    logits = model(torch.tensor([prompt])).logits[0, -1] / 3.0
    likeliest = logits.topk(5)
    expected = likeliest.values.softmax(-1)
    config = GenerationSettings(temperature=3.0, top_k=5)
    draws = drawn_alone([conversation_seed(seed, prompt) for seed in seeds], temperature=3.0, top_k=5, top_p=1.0)
    assert config.processors([prompt])[-1].seeds == [conversation_seed(42, prompt)]
    tokens = draws(torch.tensor([prompt]), (logits * 3.0).float().expand(len(seeds), -1)).argmax(-1)
    counts = torch.stack([(tokens == token).sum() for token in likeliest.indices]).double()
    assert counts.sum() == len(seeds) and 0.001 < expected.min() < expected.max() < 0.999
    chi_squared = ((counts - expected * len(seeds)) ** 2 / (expected * len(seeds))).sum()
    assert chi_squared < 18.5  # 4 degrees of freedom: once in a thousand; the seeds are fixed


def test_a_draw_leaves_the_global_generator_alone(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = asked(model, tokenizer, PROMPTS[:3], **DRAWN)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert asked(model, tokenizer, PROMPTS[:3], **DRAWN) == first


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}], ids=str)
def test_a_draw_from_one_token_is_the_likeliest(
    model: Any, tokenizer: PreTrainedTokenizerBase, narrow: dict[str, Any]
) -> None:
    assert asked(model, tokenizer, PROMPTS, **{"temperature": 5.0, **narrow}) == asked(model, tokenizer, PROMPTS)


def test_greedy_answers_draw_nothing(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    asked(model, tokenizer, PROMPTS[:2])
    assert torch.equal(torch.get_rng_state(), before)


# --- settings


@pytest.mark.parametrize(
    ("key", "given_settings"),
    [
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("max_new_tokens", {"max_new_tokens": -3}),
        ("top_k", {"top_k": -1, "temperature": 1.0}),
        ("num_beams", {"num_beams": 0}),
        ("temperature", {"temperature": -0.5}),
        ("temperature", {"temperature": 1e-40}),
        ("temperature", {"temperature": float("inf")}),
        ("temperature", {"temperature": float("nan")}),
        ("top_p", {"top_p": 0.0, "temperature": 1.0}),
        ("top_p", {"top_p": 1.01, "temperature": 1.0}),
        ("top_p", {"top_p": float("nan"), "temperature": 1.0}),
        ("repetition_penalty", {"repetition_penalty": 0.0}),
        ("repetition_penalty", {"repetition_penalty": -1.0}),
        ("repetition_penalty", {"repetition_penalty": float("inf")}),
        ("repetition_penalty", {"repetition_penalty": float("nan")}),
        ("top_p", {"top_p": 0.9}),
        ("top_k", {"top_k": 5}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**32}),
        ("num_beams", {"num_beams": 2, "temperature": 0.5}),
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_refused_by_its_key(key: str, given_settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^{key}: -?(\d|inf|nan)"):
        GenerationSettings(**given_settings)


@pytest.mark.parametrize("narrow", [{"top_p": 0.9}, {"top_k": 5}], ids=str)
def test_what_narrows_a_draw_is_refused_without_one_and_taken_with_one(narrow: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no effect at temperature 0"):
        GenerationSettings(**narrow)
    GenerationSettings(temperature=0.1, **narrow)


def test_presets_are_what_the_original_s_page_recommends() -> None:
    found = {name: GenerationSettings(**preset) for name, preset in PRESETS.items()}
    assert (found["code"].top_p, found["code"].temperature, found["code"].num_beams) == (0.95, 0.1, 1)
    assert (found["greedy"].temperature, found["greedy"].num_beams) == (0, 1)
    assert (found["beam"].temperature, found["beam"].num_beams) == (0, 3)
