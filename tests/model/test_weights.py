"""Weights made or read module by module are those of the whole model, whatever the order."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, PretrainedConfig, PreTrainedModel

from mft_lightning.errors import UserError
from mft_lightning.model.base import holds
from mft_lightning.model.export import save_base
from mft_lightning.model.weights import (
    DrawnWeights,
    GrownWeights,
    StoredWeights,
    grow_embeddings,
    materialise,
    sketch,
)

SMALL = {"vocab_size": 96, "num_attention_heads": 2}
NEOX = {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}


@pytest.fixture(params=["untied", "tied", "gpt2"])
def config(request: pytest.FixtureRequest) -> PretrainedConfig:
    if request.param == "gpt2":
        return GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2)
    return GPTNeoXConfig(**NEOX, tie_word_embeddings=request.param == "tied")


@pytest.fixture
def saved(config: PretrainedConfig, tmp_path: Path) -> Path:
    """As transformers saves it, in several files."""
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    return tmp_path / "saved"


def completed(config: PretrainedConfig, weights: object, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = sketch(config, dtype)
    materialise(model, weights)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return model


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    """In every parameter and buffer, those too that no checkpoint holds."""
    for mine, other in (
        (ours.named_parameters(), theirs.named_parameters()),
        (ours.named_buffers(), theirs.named_buffers()),
    ):
        first, second = dict(mine), dict(other)
        if first.keys() != second.keys():
            return False
        if not all(first[n].dtype == second[n].dtype and torch.equal(first[n], second[n]) for n in first):
            return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_stored_weights_are_those_that_transformers_loads(saved: Path, dtype: torch.dtype) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype)
    config = AutoConfig.from_pretrained(saved)
    weights = StoredWeights(sketch(config, dtype), dtype, str(saved))
    assert same(completed(config, weights, dtype), theirs)
    state = theirs.state_dict()
    assert weights.keys() | theirs.all_tied_weights_keys.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in weights.items())
    assert holds(saved, weights, theirs) == (dtype == torch.float32)


def test_a_drawn_module_does_not_depend_on_the_others(config: PretrainedConfig) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    weights = DrawnWeights(sketch(config, torch.float32), torch.float32, 3)
    model = completed(config, weights)
    assert torch.equal(torch.random.get_rng_state(), before)
    state = model.state_dict()
    for name in reversed(list(weights)):
        assert torch.equal(weights[name], state[name])
    other = completed(config, DrawnWeights(sketch(config, torch.float32), torch.float32, 4))
    assert not same(model, other)
    rounded = completed(config, DrawnWeights(sketch(config, torch.float32), torch.bfloat16, 3), torch.bfloat16)
    assert all(torch.equal(value.bfloat16(), rounded.state_dict()[name]) for name, value in weights.items())


def test_a_draw_is_distributed_as_transformers_draws() -> None:
    config = GPTNeoXConfig(**{**NEOX, "hidden_size": 128, "intermediate_size": 512}, initializer_range=0.05)
    ours = completed(config, DrawnWeights(sketch(config, torch.float32), torch.float32, 0)).state_dict()
    theirs = AutoModelForCausalLM.from_config(config).state_dict()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].mean(), value.mean(), rtol=0, atol=2e-3)
        if value.numel() > 1:
            torch.testing.assert_close(ours[name].std(), value.std(), rtol=0.03, atol=0)
    flat = torch.cat([value.flatten()[:4000] for value in ours.values() if value.ndim == 2])
    assert len(flat.unique()) > 0.99 * len(flat)  # no two modules have the same draw


def test_a_part_is_completed_alone(config: PretrainedConfig) -> None:
    weights = DrawnWeights(sketch(config, torch.float32), torch.float32, 3)
    whole, model = completed(config, weights), sketch(config, torch.float32)
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    materialise(model, weights, within=layers[1])
    inside = set(layers[1].parameters())
    assert all(parameter.is_meta == (parameter not in inside) for parameter in model.parameters())
    materialise(model, weights)
    assert same(model, whole)


def test_grown_embeddings_are_those_of_the_whole_model(saved: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    grow_embeddings(theirs, 101, 8, seed=2)
    stored = StoredWeights(sketch(AutoConfig.from_pretrained(saved), torch.float32), torch.float32, str(saved))
    grown = GrownWeights(stored, 101, 8, seed=2)
    model = deepcopy(grown.model)
    materialise(model, grown)
    assert theirs.get_input_embeddings().num_embeddings == 104
    assert same(model, theirs)


def test_a_base_written_in_parts_opens_as_it_was(
    config: PretrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mft_lightning.model.export.PART", 20_000)
    weights = DrawnWeights(sketch(config, torch.bfloat16), torch.bfloat16, 3)
    tmp_path.joinpath("base").mkdir()
    save_base(weights.model, weights, tmp_path / "base")
    assert len(list(tmp_path.glob("base/*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    assert same(theirs, completed(config, weights, torch.bfloat16))
    assert holds(tmp_path / "base", weights, weights.model)


def test_old_files_of_pytorch_are_read_too(saved: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    old = tmp_path / "old"
    old.mkdir()
    config.save_pretrained(old)
    state: dict[str, torch.Tensor] = {}
    for file in saved.glob("*.safetensors"):
        state |= load_file(file)
    turned = {name: value.t().contiguous().t() if value.ndim == 2 else value for name, value in state.items()}
    for zipped in (True, False):
        torch.save(turned, old / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        ours = completed(config, StoredWeights(sketch(config, torch.float32), torch.float32, str(old)))
        assert all(parameter.is_contiguous() for parameter in ours.parameters())
        assert same(ours, AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32))


def test_weights_of_eight_bits_are_read_too(tmp_path: Path) -> None:
    config = GPTNeoXConfig(**NEOX)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    small = {name: value.to(torch.float8_e4m3fn) for name, value in load_file(file).items()}
    save_file(small, file, {"format": "pt"})
    ours = completed(config, StoredWeights(sketch(config, torch.float32), torch.float32, str(tmp_path)))
    assert same(ours, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def test_what_is_missing_damaged_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    config = GPTNeoXConfig(**NEOX)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state, name = load_file(file), "gpt_neox.layers.1.mlp.dense_h_to_4h.bias"

    save_file({key: value for key, value in state.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"lacks 1 weights of the model, first {name}"):
        StoredWeights(sketch(config, torch.float32), torch.float32, str(tmp_path))
    save_file({**state, name: torch.zeros(7)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"has a {name} of \(7,\), the model one of \(64,\)"):
        StoredWeights(sketch(config, torch.float32), torch.float32, str(tmp_path))
    save_file({**state, name: torch.full((64,), torch.nan)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} is not finite"):
        completed(config, StoredWeights(sketch(config, torch.float32), torch.float32, str(tmp_path)))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.pretrained_model_path: .*cannot be loaded"):
        StoredWeights(sketch(config, torch.float32), torch.float32, str(tmp_path))
    file.unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors .* set model\.init: random"):
        StoredWeights(sketch(config, torch.float32), torch.float32, str(tmp_path))
