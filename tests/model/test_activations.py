"""What the formula says a layer keeps is what autograd keeps, to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from mft_lightning.data.collate import MicroBatch
from mft_lightning.model.activations import Computation, kept_by_layer
from mft_lightning.model.attention import SDPA_BY_CONVERSATION
from mft_lightning.model.lora import add_lora
from mft_lightning.model.lora_start import LoraStart
from mft_lightning.model.product_dtype import computes_bfloat16
from mft_lightning.model.settings import LoraSettings
from mft_lightning.model.supervised_loss import SupervisedLM

CONVERSATIONS, LENGTH = 3, 16
TOKENS = CONVERSATIONS * LENGTH
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 192, "vocab_size": 128, "rotary_pct": 0.25}


def network(layers: int, attention: str, adapters: LoraSettings | None, **config: Any) -> SupervisedLM:
    settings = GPTNeoXConfig(num_hidden_layers=layers, **SIZES, **config)
    model = AutoModelForCausalLM.from_config(settings, attn_implementation=attention).train()
    if adapters is None:
        return SupervisedLM(model)
    adapted = add_lora(model, adapters, base_path="base")
    LoraStart("default", seed=0).fill(model)
    return SupervisedLM(adapted)


def micro_batch(packed: bool) -> MicroBatch:
    shape = (1, TOKENS) if packed else (CONVERSATIONS, LENGTH)
    nothing = torch.empty(0, dtype=torch.int64)
    return MicroBatch(
        input_ids=torch.arange(TOKENS).view(shape),
        position_ids=torch.arange(LENGTH).repeat(CONVERSATIONS).view(shape),
        predictors=nothing,
        targets=nothing,
        conversation=nothing,
        tasks=nothing,
        n_supervised=nothing,
        numbers=nothing,
        packed_lengths=(LENGTH,) * CONVERSATIONS if packed else (),
    )


@contextmanager
def keeping(kept: dict[int, Tensor]) -> Iterator[None]:
    """In the block autograd keeps tensors in ``kept`` too, by the memory that they share."""

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def bytes_kept(found: SupervisedLM, packed: bool, autocast: bool) -> int:
    """Without the weights, and under autocast without what they are cast to."""
    kept: dict[int, Tensor] = {}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if autocast else nullcontext(), keeping(kept):
        found.hidden_states(micro_batch(packed))
    for tensor in [*found.parameters(), *found.buffers()]:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    shapes = {shape for parameter in found.parameters() for shape in (parameter.shape, parameter.shape[::-1])}
    casts = [key for key, tensor in kept.items() if autocast and tensor.dtype == torch.bfloat16 and tensor.ndim == 2]
    for key in casts:
        if kept[key].shape in shapes and len(kept[key]) != TOKENS:
            del kept[key]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"autocast": True},
        {"adapters": LoraSettings(r=8)},
        {"adapters": LoraSettings(r=8), "autocast": True},
        {"adapters": LoraSettings(r=8, dropout=0)},
        {"adapters": LoraSettings(r=8, target_modules=["query_key_value"])},
        {"attention": "eager"},
        {"attention": "eager", "autocast": True},
        {"attention": "eager", "attention_dropout": 0.1},
        {"attention_dropout": 0.1},
        {"hidden_dropout": 0.1},
        {"use_parallel_residual": False},
        {"hidden_act": "gelu_fast"},
    ],
    ids=str,
)
def test_a_layer_keeps_what_the_formula_says(case: dict[str, Any], packed: bool) -> None:
    case = {"attention": SDPA_BY_CONVERSATION, "adapters": None, "autocast": False, **case}
    autocast = case.pop("autocast")
    two, three = (network(layers, **case) for layers in (2, 3))
    measured = bytes_kept(three, packed, autocast) - bytes_kept(two, packed, autocast)
    how = Computation(
        stream=4,
        product=2 if autocast else 4,
        adapter=4,
        device="cpu",
        norms_cast=False,
        rows=1 if packed else CONVERSATIONS,
        length=TOKENS if packed and case["attention"] == "eager" else LENGTH,
        blocked=autocast and packed and case["attention"] != "eager" and computes_bfloat16(),
    )
    model = three.causal_lm
    assert TOKENS * sum(kept_by_layer(model.base_model.layers[1], model.config, how).values()) == measured
