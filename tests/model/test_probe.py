"""Models that training would compute a wrong loss of are refused; others of transformers train."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from mft_lightning.errors import UserError
from mft_lightning.model.probe import check_assumptions
from mft_lightning.model.supervised_loss import SupervisedLM

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 8}


def small(model: type[PreTrainedModel], config: type, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return model(config(**settings))


@pytest.mark.parametrize(
    "model",
    [
        small(LlamaForCausalLM, LlamaConfig, **LLAMA),
        small(GPT2LMHeadModel, GPT2Config, vocab_size=64, n_embd=32, n_layer=2, n_head=4),
    ],
    ids=["llama", "gpt2"],
)
@pytest.mark.parametrize("packed", [True, False])
def test_models_that_keep_the_assumptions_pass_and_keep_their_mode(model: PreTrainedModel, packed: bool) -> None:
    model.train()
    check_assumptions(SupervisedLM(model), packed=packed)
    assert model.training


def test_attention_that_is_less_exact_than_the_weights_passes() -> None:
    model = small(GPTNeoXForCausalLM, GPTNeoXConfig, **SMALL, intermediate_size=64).double()
    model.set_attn_implementation("eager")
    check_assumptions(SupervisedLM(model), packed=True)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (small(CohereForCausalLM, CohereConfig, **LLAMA, logit_scale=0.1), "not its head's output alone"),
        (small(Gemma2ForCausalLM, Gemma2Config, **LLAMA, final_logit_softcapping=0.01), "not its head's output alone"),
        (small(BertLMHeadModel, BertConfig, **SMALL, intermediate_size=64, is_decoder=False), "is not|looks at later"),
    ],
    ids=["cohere", "gemma2", "bert"],
)
def test_a_head_or_a_direction_of_its_own_is_refused(model: PreTrainedModel, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_assumptions(SupervisedLM(model), packed=False)


def test_weights_that_are_no_numbers_are_told_as_such() -> None:
    model = small(LlamaForCausalLM, LlamaConfig, **LLAMA)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    with pytest.raises(UserError, match=r"model\.pretrained_model_path: the model's logits are not finite"):
        check_assumptions(SupervisedLM(model), packed=False)


def test_packing_is_refused_where_conversations_would_see_each_other() -> None:
    opt = small(OPTForCausalLM, OPTConfig, **SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64)
    check_assumptions(SupervisedLM(opt), packed=False)
    with pytest.raises(UserError, match=r"data\.padding_mode: opt does not keep packed conversations apart"):
        check_assumptions(SupervisedLM(opt), packed=True)
