"""What benchmarks/cost_model.py says of shapes alone; test_scaling.py counts what it says of bytes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks.cost_model import (
    BF16_MIXED,
    FLOAT32,
    MODELS,
    Collective,
    Layout,
    Micro,
    Shape,
    collectives,
    elements,
    head_flops,
    layer_flops,
    memory,
)
from benchmarks.gpu_estimate import Hardware, best, estimate

PUBLISHED = {
    "Pythia-1.4b": 1_414_647_808,
    "Pythia-6.9b": 6_857_302_016,
    "Pythia-12b": 11_846_072_320,
    "GPT-NeoX-20B": 20_554_567_680,
}
GB = 1e9
MICRO = Micro(tokens=16384, supervised=8192, squares=16384 * 1024)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_its_published_parameters(name: str) -> None:
    assert MODELS[name].parameters() == PUBLISHED[name]


def test_matrices_take_the_flops_that_torch_counts() -> None:
    config = GPTNeoXConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    shape, tokens = Shape(hidden=32, layers=2, intermediate=128, vocabulary=96), 24
    model = GPTNeoXForCausalLM(config)
    assert shape.parameters() == model.num_parameters()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False).logits.sum().backward()
    found = counter.get_flop_counts()["Global"]
    matrices = sum(flops for kind, flops in found.items() if kind in (torch.ops.aten.mm, torch.ops.aten.addmm))
    micro = Micro(tokens, supervised=tokens, squares=0)
    assert matrices == 3 * shape.layers * layer_flops(shape, micro) + head_flops(shape, micro)


def test_a_ring_sends_an_all_reduce_twice() -> None:
    assert Collective("all_gather", 800, 8, 1).sent == 700
    assert Collective("reduce_scatter", 800, 8, 3).sent == 2100
    assert Collective("all_reduce", 800, 8, 1).sent == 1400
    assert elements([(5, 3), (4, 1)], shards=4) == 8 * 3 + 4


def test_tensor_parallel_devices_share_the_matrices_of_layers_and_the_head() -> None:
    shape = MODELS["Pythia-1.4b"]
    layer, half = elements(shape.layer_tensors()), elements(shape.layer_tensors(2))
    assert layer / 2 < half < 0.51 * layer
    assert elements(shape.root_tensors()) - elements(shape.root_tensors(2)) == shape.vocabulary * shape.hidden / 2
    assert shape.parameters(2) == shape.layers * half + elements(shape.root_tensors(2))


def test_one_process_tells_nobody_anything() -> None:
    for strategy in ("ddp", "fsdp"):
        assert collectives(MODELS["Pythia-1.4b"], Layout(strategy, 1), [MICRO], FLOAT32) == []


def test_sharding_divides_what_is_kept_between_steps() -> None:
    shape = MODELS["Pythia-6.9b"]
    one, many = (memory(shape, Layout("fsdp", devices), [MICRO], BF16_MIXED, 0.0) for devices in (1, 64))
    assert one["weights"] + one["gradients"] + one["optimizer"] == 16 * shape.parameters()
    for part in ("weights", "gradients", "optimizer"):
        assert many[part] == one[part] / 64


def test_a_layout_is_chosen_that_fits() -> None:
    shape, hardware = MODELS["GPT-NeoX-20B"], Hardware()
    chosen = best(shape, 8, MICRO, hardware)
    assert chosen is not None and chosen.layout.strategy == "fsdp"
    assert chosen.bytes < 72 * GB < estimate(shape, Layout("ddp", 8), MICRO, hardware).bytes
    assert 0 < chosen.communicating < chosen.seconds
    assert chosen.useful / chosen.seconds < hardware.peak * hardware.ceiling
    assert best(shape, 1, MICRO, hardware) is None


def test_useful_work_is_the_same_in_every_layout() -> None:
    shape, hardware = MODELS["Pythia-1.4b"], Hardware()
    group = Micro(*(4 * value for value in (MICRO.tokens, MICRO.supervised, MICRO.squares)))
    alone = estimate(shape, Layout("fsdp", 8), MICRO, hardware)
    for layout in (Layout("fsdp", 8, 4), Layout("fsdp", 8, 4, checkpointing=True)):
        assert estimate(shape, layout, group, hardware).useful == pytest.approx(alone.useful)
