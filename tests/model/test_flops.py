"""Useful operations are those that torch counts of a plain transformers or peft step."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from mft_lightning.model.flops import UsefulFlops
from mft_lightning.model.quantized import materialise_quantized, quantize
from mft_lightning.model.settings import QLoraSettings
from mft_lightning.model.weights import DrawnWeights, sketch

LENGTH, VOCABULARY, HIDDEN, INNER, LAYERS, RANK = 24, 96, 32, 80, 2, 4
NEOX = GPTNeoXConfig(
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_attention_heads=4,
    num_hidden_layers=LAYERS,
    vocab_size=VOCABULARY,
    rotary_pct=0.5,
)
LLAMA = LlamaConfig(
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    num_hidden_layers=LAYERS,
    vocab_size=VOCABULARY,
    tie_word_embeddings=True,
)
GPT2 = GPT2Config(n_embd=HIDDEN, n_head=4, n_layer=LAYERS, vocab_size=VOCABULARY, n_positions=LENGTH)
WIDTHS = {"gpt_neox": HIDDEN, "llama": 4 * 12, "gpt2": HIDDEN}  # of the queries of all heads


def plain(config: PretrainedConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


def counted(model: torch.nn.Module) -> int:
    """Operations of products in a step on one conversation whose every token is supervised."""
    ids = torch.arange(LENGTH)[None] % VOCABULARY
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


def masked(config: PretrainedConfig) -> int:
    """Those of the half of the pairs that look at later tokens, forward and twice backward, which torch counts too."""
    return 3 * 2 * WIDTHS[config.model_type] * LENGTH**2 * LAYERS


def useful(model: PreTrainedModel) -> int:
    return UsefulFlops.of(model).of_step(LENGTH, LENGTH, LENGTH**2)


@pytest.mark.parametrize("config", [NEOX, LLAMA, GPT2], ids=lambda config: config.model_type)
def test_of_a_full_step_they_are_torch_s_count_without_the_masked_half(config: PretrainedConfig) -> None:
    model = plain(config)
    assert useful(model) == counted(model) - masked(config)


def test_of_a_lora_step_torch_counts_no_gradient_of_the_first_layer_s_inputs() -> None:
    adapters = LoraConfig(r=RANK, target_modules=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"])
    adapted = get_peft_model(plain(NEOX), adapters)
    outputs = 3 * HIDDEN + INNER  # of both layers that read the embeddings
    unneeded = 2 * LENGTH * (HIDDEN * outputs + 2 * RANK * HIDDEN)
    assert useful(adapted.get_base_model()) == counted(adapted) - masked(NEOX) + unneeded


def test_a_head_that_trains_whole_counts_once() -> None:
    adapters = LoraConfig(r=RANK, target_modules=["query_key_value"], modules_to_save=["embed_in", "lm_head"])
    adapted = get_peft_model(plain(NEOX), adapters)
    assert useful(adapted.get_base_model()) == counted(adapted) - masked(NEOX)


def test_the_head_counts_for_supervised_tokens_alone() -> None:
    flops = UsefulFlops.of(plain(NEOX))
    assert flops.of_step(10, 3, 40) - flops.of_step(10, 2, 40) == 6 * HIDDEN * VOCABULARY


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_counts_as_the_base_it_was(bits: int) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, an optional dependency, is not installed")
    model = sketch(NEOX, torch.float32).requires_grad_(False)
    whole, weights = UsefulFlops.of(model), DrawnWeights(deepcopy(model), torch.float32, 0)
    quantize(model, QLoraSettings(bits=bits).resolved("float32"))
    assert UsefulFlops.of(model) == whole
    materialise_quantized(model, weights)
    assert UsefulFlops.of(model) == whole
