"""Merged weights compute what base and adapter compute, whatever peft wrote of the adapter."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from mft_lightning.errors import UserError
from mft_lightning.model.export import save_base
from mft_lightning.model.merging import MergedWeights, read_base

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
NEOX = GPTNeoXConfig(**SIZES, intermediate_size=64)
TIED = GPTNeoXConfig(**SIZES, intermediate_size=64, tie_word_embeddings=True)
LLAMA = LlamaConfig(**SIZES, intermediate_size=64)
GPT2 = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2)
IDS = torch.arange(2, 62).view(2, 30)
BOTH = ["query_key_value", "dense_4h_to_h"]
# name -> the base, what LoraConfig is told beside the rank
CASES: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "plain": (NEOX, {}),
    "llama": (LLAMA, {}),
    "gpt2, whose matrices are transposed": (GPT2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "rslora": (NEOX, {"use_rslora": True}),
    "dora": (NEOX, {"use_dora": True, "target_modules": BOTH}),
    "dora on gpt2": (GPT2, {"use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "patterns": (
        NEOX,
        {"target_modules": BOTH, "rank_pattern": {"dense_4h_to_h": 5}, "alpha_pattern": {"query_key_value": 40}},
    ),
    "one layer": (NEOX, {"target_modules": BOTH, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "all linear layers": (NEOX, {"target_modules": "all-linear"}),
    "gaussian": (NEOX, {"init_lora_weights": "gaussian"}),
    "pissa": (NEOX, {"init_lora_weights": "pissa"}),
    "olora with dora": (NEOX, {"init_lora_weights": "olora", "use_dora": True}),
    "all biases": (NEOX, {"bias": "all"}),
    "adapted layers' biases": (NEOX, {"bias": "lora_only"}),
    "a bias of the adapter": (NEOX, {"lora_bias": True}),
    "a whole head": (NEOX, {"modules_to_save": ["lm_head"]}),
    "whole embeddings and head": (NEOX, {"modules_to_save": ["embed_in", "lm_head"]}),
    "a whole block": (NEOX, {"target_modules": ["query_key_value"], "modules_to_save": ["mlp"]}),
    "adapted embeddings and head": (NEOX, {"target_modules": ["embed_in", "lm_head", *BOTH]}),
    "single tokens": (NEOX, {"trainable_token_indices": [3, 95]}),
    "tied": (TIED, {}),
    "tied, an adapted head": (TIED, {"target_modules": ["lm_head", *BOTH]}),
    "tied, adapted embeddings": (TIED, {"target_modules": ["embed_in", *BOTH]}),
    "tied, whole embeddings": (TIED, {"modules_to_save": ["embed_in"]}),
    "tied, adapted embeddings, and so the head": (TIED, {"target_modules": ["embed_in"], "ensure_weight_tying": True}),
    "tied, whole embeddings, and so the head": (TIED, {"modules_to_save": ["embed_in"], "ensure_weight_tying": True}),
    "tied, single tokens": (TIED, {"trainable_token_indices": [3, 95]}),
}


def drawn(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(deepcopy(config)).eval()


def train(model: PeftModel, seed: int = 1) -> None:
    """Give everything that trains other values."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def saved(
    directory: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Path, Path]:
    """A base and an adapter, written by transformers and peft."""
    base, adapter = directory / "base", directory / "adapter"
    drawn(config).to(dtype).save_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 7} | options), autocast_adapter_dtype=False)
    train(model)
    model.save_pretrained(adapter)
    return base, adapter


def opened(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()


def merged(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> MergedWeights:
    return MergedWeights(adapter, read_base(str(base), None, "the base"), dtype, torch.device("cpu"), "the adapter")


def written(weights: MergedWeights, directory: Path) -> PreTrainedModel:
    directory.mkdir()
    save_base(weights.model, weights, directory)
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("case", CASES)
def test_its_logits_are_those_of_base_and_adapter(tmp_path: Path, case: str) -> None:
    config, options = CASES[case]
    base, adapter = saved(tmp_path, config, **options)
    two, one = opened(base, adapter), written(merged(base, adapter), tmp_path / "merged")
    assert torch.allclose(logits(one), logits(two), rtol=1e-5, atol=1e-5)
    assert (logits(one) - logits(drawn(config))).abs().max() > 1e-2
    if "tied, " not in case:  # where peft's own merge changes both ends, though its adapter changes one
        theirs = two.merge_and_unload().state_dict()
        ours = one.state_dict()
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-7) for name in theirs)


def test_embeddings_with_more_rows_than_the_base_make_a_larger_vocabulary(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    drawn(NEOX).save_pretrained(base)
    larger = drawn(NEOX)
    larger.resize_token_embeddings(101)
    model = get_peft_model(larger, LoraConfig(r=3, modules_to_save=["embed_in", "lm_head"]))
    train(model)
    model.save_pretrained(adapter)
    one = written(merged(base, adapter), tmp_path / "merged")
    assert one.config.vocab_size == 101 == one.get_input_embeddings().num_embeddings
    assert torch.allclose(logits(one), logits(model.eval()), rtol=1e-5, atol=1e-5)


def test_rows_for_some_weights_and_not_for_others_are_refused(tmp_path: Path) -> None:
    drawn(NEOX).save_pretrained(tmp_path / "base")
    larger = drawn(NEOX)
    larger.resize_token_embeddings(101)
    get_peft_model(larger, LoraConfig(r=3, modules_to_save=["embed_in"])).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False
    )
    with pytest.raises(UserError, match=r"another number of tokens than its base, but no lm_head\.weight"):
        merged(tmp_path / "base", tmp_path / "adapter")


def test_weights_of_16_bits_are_rounded_once(tmp_path: Path) -> None:
    """peft's own merge rounds what the adapter adds, and then the sum."""
    base, adapter = saved(tmp_path, NEOX, torch.bfloat16)
    exact: Any = opened(base, adapter, torch.bfloat16).to(torch.float64).merge_and_unload()
    theirs: Any = opened(base, adapter, torch.bfloat16).merge_and_unload()
    ours, wide = merged(base, adapter, torch.bfloat16), merged(base, adapter)
    for layer in (0, 1):
        name = f"gpt_neox.layers.{layer}.attention.query_key_value.weight"
        value = exact.state_dict()[name]
        assert torch.allclose(wide[name].double(), value, rtol=1e-6, atol=1e-8)
        nearest = value.to(torch.bfloat16)  # of 3072, where float32 falls between two one may be the other
        assert (ours[name] == nearest).float().mean() > 0.999
        assert (theirs.state_dict()[name] == nearest).float().mean() < 0.9


def test_what_the_adapter_leaves_alone_is_the_bases_to_the_bit(tmp_path: Path) -> None:
    base, adapter = saved(tmp_path, NEOX)
    had = AutoModelForCausalLM.from_pretrained(base).state_dict()
    differing = {name for name, value in merged(base, adapter).items() if not torch.equal(value, had[name])}
    assert differing == {f"gpt_neox.layers.{layer}.attention.query_key_value.weight" for layer in (0, 1)}


def test_an_adapter_of_an_older_peft_is_read(tmp_path: Path) -> None:
    base, adapter = saved(tmp_path, NEOX)
    expected = dict(merged(base, adapter))
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert all(torch.equal(value, expected[name]) for name, value in merged(base, adapter).items())


# --- refusals

LAYER = "gpt_neox.layers.1.attention.query_key_value"


def changed(adapter: Path, name: str, value: torch.Tensor | None) -> None:
    """Put another tensor into an adapter's file, or take one out."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    if value is None:
        del tensors[f"base_model.model.{name}"]
    else:
        tensors[f"base_model.model.{name}"] = value
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{LAYER}.lora_A.weight", None, f"it lacks base_model.model.{LAYER}.lora_A.weight"),
        (f"{LAYER}.lora_C.weight", torch.ones(3), f"it has base_model.model.{LAYER}.lora_C.weight, which"),
        (f"{LAYER}.lora_B.weight", torch.ones(4, 3), r"is of \(4, 3\), of this base it would be \(96, 3\)"),
    ],
    ids=["too little", "too much", "another shape"],
)
def test_an_adapter_of_another_model_is_refused(
    tmp_path: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    base, adapter = saved(tmp_path, NEOX)
    changed(adapter, name, value)
    with pytest.raises(UserError, match=message):
        merged(base, adapter)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, broken: float) -> None:
    base, adapter = saved(tmp_path, NEOX)
    changed(adapter, f"{LAYER}.lora_B.weight", torch.full((96, 3), broken))
    with pytest.raises(UserError, match=rf"the adapter: merged, {LAYER}\.weight is not finite"):
        dict(merged(base, adapter))


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    base, adapter = saved(tmp_path, NEOX)
    changed(adapter, f"{LAYER}.lora_B.weight", torch.full((96, 3), 1e6))
    with pytest.raises(UserError, match=rf"--dtype: {LAYER}\.weight has a value of .*, which float16 cannot hold"):
        dict(merged(base, adapter, torch.float16))
    assert dict(merged(base, adapter))


def test_another_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    drawn(NEOX).save_pretrained(tmp_path / "base")
    get_peft_model(drawn(NEOX), IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="is a IA3 adapter"):
        merged(tmp_path / "base", tmp_path / "adapter")


def test_layers_that_peft_repeats_are_refused(tmp_path: Path) -> None:
    base, adapter = saved(tmp_path, LLAMA, layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(UserError, match="repeats layers"):
        merged(base, adapter)


def test_a_base_in_other_parts_is_refused(tmp_path: Path) -> None:
    config = MixtralConfig(**SIZES, num_key_value_heads=2, intermediate_size=64, num_local_experts=2)
    drawn(config).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="the base: its files hold weights of a mixtral in other parts"):
        read_base(str(tmp_path / "base"), None, "the base")
