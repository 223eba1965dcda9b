"""A base in 4 or 8 bits is the one that transformers and bitsandbytes make of the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.errors import UserError
from mft_lightning.model.base import base_digest, base_state
from mft_lightning.model.build import count_parameters
from mft_lightning.model.export import ModelWriter, save_causal_lm
from mft_lightning.model.module import MFTModule
from mft_lightning.model.quantized import DequantizedWeights, described, settings_of
from mft_lightning.model.settings import LoraSettings, QLoraSettings
from mft_lightning.model.source import ModelSource, build_causal_lm, sketch_causal_lm

KINDS = [
    QLoraSettings(),
    QLoraSettings(double_quant=False),
    QLoraSettings(quant_type="fp4"),
    QLoraSettings(compute_dtype="bfloat16"),
    QLoraSettings(bits=8),
]
IDS = ["nf4", "nf4, single", "fp4", "nf4 in bfloat16", "8 bits"]
Built = Callable[..., MFTModule]


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model as a directory with weights, of which biases and norms are none that stay zero or one."""
    directory = tmp_path_factory.mktemp("base")
    shutil.copytree(tiny_model, directory, dirs_exist_ok=True)
    model = build_causal_lm(_source(tiny_model, init="random"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_causal_lm(model, model.state_dict(), directory)
    return directory


@pytest.fixture
def built(base: Path, example_tasks: list[str]) -> Built:
    def build(settings: QLoraSettings, **words: Any) -> MFTModule:
        module = MFTModule(
            pretrained_model_path=str(base), peft_type="qlora", qlora=settings, lora=LoraSettings(r=4), **words
        )
        module.build(MFTDataModule(data_paths=example_tasks, tokenizer_path=str(base)))
        return module

    return build


def _source(path: Path, init: Any = "pretrained", dtype: torch.dtype = torch.float32) -> ModelSource:
    return ModelSource(
        path=str(path),
        init=init,
        model_type="gpt_neox",
        dtype=dtype,
        attn_implementation="sdpa",
        trust_remote_code=False,
        seed=42,
    )


def _by_transformers(
    base: Path, settings: QLoraSettings, dtype: torch.dtype = torch.float32, skipped: list[str] | None = None
) -> Any:
    """The same base, by transformers' own loading."""
    config = BitsAndBytesConfig(
        load_in_4bit=settings.bits == 4,
        load_in_8bit=settings.bits == 8,
        bnb_4bit_quant_type=settings.quant_type,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=settings.compute_dtype or dtype,
        llm_int8_skip_modules=skipped,  # the name is old; it is of 4 bits too
    )
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=config, device_map={"": "cpu"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", KINDS, ids=IDS)
def test_the_bits_are_those_of_transformers(built: Built, base: Path, settings: QLoraSettings, dtype: str) -> None:
    module = built(settings, dtype=dtype, product_dtype=dtype)
    ours = base_state(module.network.model)
    theirs = _by_transformers(base, settings, getattr(torch, dtype)).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    packed = {name for name, value in ours.items() if value.dtype in (torch.uint8, torch.int8)}
    layers = [f"gpt_neox.layers.{i}." for i in range(2)]
    names = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert {name for name in packed if name.endswith(".weight")} == {f"{a}{b}.weight" for a in layers for b in names}


@pytest.mark.parametrize("settings", KINDS, ids=IDS)
def test_the_forward_is_that_of_transformers_and_peft(
    built: Built, base: Path, settings: QLoraSettings, tmp_path: Path
) -> None:
    """After training steps, a validation and what it may do to a layer, in both modes; gradients too."""
    module = built(settings)
    network, model = module.network, module.network.model
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    ids = torch.randint(0, 500, (2, 33), generator=torch.Generator().manual_seed(3))
    _train(model, ids)
    with torch.no_grad():
        model.eval()(input_ids=ids)
    model.train()
    state = {name: value for name, value in model.state_dict().items() if ".lora_" in name}
    ModelWriter(model)(state, tmp_path)
    theirs = PeftModel.from_pretrained(_by_transformers(base, settings), tmp_path, is_trainable=True)
    for layer in theirs.modules():  # whose evaluation rounds scales where a CPU has bfloat16
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    for mode in (True, False):
        model.train(mode), theirs.train(mode)
        for layer in theirs.modules():
            if isinstance(layer, Linear8bitLt):  # whose evaluation would round what comes in too
                layer.training = True
        ours, expected = (one(input_ids=ids, labels=ids) for one in (model, theirs))
        assert torch.equal(ours.logits, expected.logits)
        if mode:
            ours.loss.backward(), expected.loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    wanted = {name: value.grad for name, value in theirs.named_parameters() if value.grad is not None}
    assert found.keys() == wanted.keys() and len(found) == 16
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-6, atol=1e-9) for name in found)
    assert network.causal_lm.config.to_dict().get("quantization_config") is None


@pytest.mark.parametrize("mode", [True, False])
def test_in_eight_bits_a_row_does_not_depend_on_the_rows_beside_it(built: Built, base: Path, mode: bool) -> None:
    """Of which one has outliers in every second column; all are products of what transformers brings back."""
    layer = built(QLoraSettings(bits=8)).network.causal_lm.gpt_neox.layers[0].mlp.dense_h_to_4h.base_layer.train(mode)
    rows = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    rows[0, ::2] *= 40
    with torch.no_grad():
        assert torch.allclose(layer(rows)[1:], layer(rows[1:]), rtol=1e-5, atol=1e-6)
        whole = _by_transformers(base, QLoraSettings(bits=8)).dequantize(torch.float32)
        expected = whole.gpt_neox.layers[0].mlp.dense_h_to_4h(rows)
        assert torch.allclose(layer(rows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_trains_whole_is_not_quantised(base: Path, example_tasks: list[str], bits: int) -> None:
    """As where transformers is told to skip it."""
    settings, named = QLoraSettings(bits=bits), ["dense_4h_to_h", "final_layer_norm"]  # type: ignore[arg-type]
    lora = LoraSettings(r=4, target_modules=["dense"], modules_to_save=named)
    module = MFTModule(pretrained_model_path=str(base), peft_type="qlora", qlora=settings, lora=lora)
    module.build(MFTDataModule(data_paths=example_tasks, tokenizer_path=str(base)))
    ours = base_state(module.network.model)
    theirs = _by_transformers(base, settings, skipped=["lm_head", *named])
    expected = theirs.state_dict()
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    assert sum(value.dtype in (torch.uint8, torch.int8) and value.ndim == 2 for value in ours.values()) == 6
    found = DequantizedWeights(sketch_causal_lm(_source(base))[1], settings, named)
    brought_back = theirs.dequantize(torch.float32).state_dict()
    assert all(torch.equal(found[name], brought_back[name]) for name in brought_back)


def _train(model: nn.Module, ids: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    before = None
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        assert before is None or loss < before
        before = loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("settings", KINDS, ids=IDS)
def test_dequantised_weights_are_those_that_are_computed_with(
    built: Built, base: Path, settings: QLoraSettings
) -> None:
    """transformers' own way back, tensor by tensor; and what a run says of its base is of the weights before."""
    weights = sketch_causal_lm(_source(base))[1]
    found = DequantizedWeights(weights, settings)
    expected = _by_transformers(base, settings).dequantize(torch.float32).state_dict()
    assert dict(found).keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    changed = [name for name in found if not torch.equal(found[name], weights[name])]
    assert len(changed) == 8 and all(torch.equal(found.of(name[:-7])["weight"], found[name]) for name in changed)
    module = built(settings)
    assert module.description["frozen base (digest)"] == base_digest(weights)


def test_numbers_of_parameters_are_those_of_the_whole_weights(built: Built, base: Path) -> None:
    full = sum(parameter.numel() for parameter in build_causal_lm(_source(base)).parameters())
    for settings in KINDS:
        trainable, total = count_parameters(built(settings).network)
        assert total - trainable == full


def test_eight_bits_are_together_wherever_a_network_is_moved(built: Built) -> None:
    network = built(QLoraSettings(bits=8)).network
    network._apply(lambda tensor: tensor.clone())  # what every move does, to another device too
    layers = [layer for layer in network.modules() if isinstance(layer, Linear8bitLt)]
    assert len(layers) == 8
    assert all(layer.state.CB.data_ptr() == layer.weight.data_ptr() for layer in layers)


def test_a_description_and_its_settings_are_the_same() -> None:
    for settings in KINDS:
        resolved = settings.resolved("bfloat16")
        assert settings_of(described(resolved)) == resolved
    assert settings_of(described(None)) is None and settings_of({}) is None
    assert described(QLoraSettings(bits=8))["model.qlora.quant_type"] is None


def test_what_cannot_be_is_refused(base: Path, example_tasks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    datamodule = MFTDataModule(data_paths=example_tasks, tokenizer_path=str(base), seq_length=64)
    for words in ({"quant_type": "fp4"}, {"double_quant": False}, {"compute_dtype": "bfloat16"}):
        with pytest.raises(UserError, match=f"model.qlora.{next(iter(words))}: is of 4 bits"):
            QLoraSettings(bits=8, **words)
    with pytest.raises(UserError, match="64-true is too much"):
        MFTModule(pretrained_model_path=str(base), peft_type="qlora", dtype="float64").check(datamodule)
    monkeypatch.setattr("mft_lightning.model.quantized.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes, which is not installed. Install it with .*\[qlora\]"):
        MFTModule(pretrained_model_path=str(base), peft_type="qlora").check(datamodule)
    MFTModule(pretrained_model_path=str(base), peft_type="qlora").check(datamodule, data_alone=True)
    MFTModule(pretrained_model_path=str(base), peft_type="lora").check(datamodule)
