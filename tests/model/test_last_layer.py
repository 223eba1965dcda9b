"""The last layer gives what transformers' gives where it is needed, and computes no MLP elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from mft_lightning.model.last_layer import is_shortened, shorten_last_layer
from mft_lightning.model.supervised_loss import SupervisedLM

HIDDEN, WIDE, LAYERS = 32, 96, 3
IDS = torch.arange(26).view(2, 13)
NEEDED = torch.tensor([0, 5, 12, 13, 20])


def model(**config: Any) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_attention_heads": 4, "num_hidden_layers": LAYERS}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=64, **config)).double()


def states(found: GPTNeoXForCausalLM, **more: Any) -> torch.Tensor:
    return found.base_model(input_ids=IDS, use_cache=False, **more).last_hidden_state


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
def test_it_is_transformers_layer_at_some_tokens(parallel: bool, again: bool) -> None:
    theirs = model(use_parallel_residual=parallel).train()
    ours = copy.deepcopy(theirs)
    shorten_last_layer(ours)
    if again:
        ours.activation_checkpointing_enable({"use_reentrant": False})
    assert is_shortened(ours) and not is_shortened(theirs)
    expected, found = states(theirs).flatten(0, 1)[NEEDED], states(ours, needed=NEEDED)[0]
    torch.testing.assert_close(found, expected)
    towards = torch.randn(expected.shape, dtype=torch.float64)
    expected.backward(towards)
    found.backward(towards)
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_all_tokens_are_transformers_own() -> None:
    theirs = model()
    ours = copy.deepcopy(theirs)
    shorten_last_layer(ours)
    assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_its_mlp_is_computed_where_it_is_needed_alone() -> None:
    found = SupervisedLM(model()).causal_lm  # which shortens it
    operations = []
    for more in ({}, {"needed": NEEDED}):
        with FlopCounterMode(display=False) as counter:
            states(found, **more).sum().backward()
        operations.append(counter.get_total_flops())
    saved = IDS.numel() - len(NEEDED)
    assert operations[0] - operations[1] == 3 * 2 * 2 * HIDDEN * WIDE * saved


def test_another_model_stays_as_it_is() -> None:
    found = model()
    found.config.model_type = "another"
    shorten_last_layer(found)
    assert not is_shortened(found)
