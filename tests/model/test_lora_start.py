"""Adapters of every kind start as peft has them, leave the base on the disk alone, and open with peft over it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.errors import UserError
from mft_lightning.model.base import base_digest, base_state
from mft_lightning.model.export import ModelWriter, load_initial, load_state, trained_names
from mft_lightning.model.lora_start import LoraStart
from mft_lightning.model.module import MFTModule
from mft_lightning.model.settings import LoraSettings
from mft_lightning.model.source import ModelSource, build_causal_lm

IDS = torch.arange(2, 62).view(2, 30)
PATTERNS = {"rank_pattern": {"dense": 3, "0.attention.query_key_value": 6}, "alpha_pattern": {"mlp.dense_h_to_4h": 2.5}}
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init": "pissa"},
    "pissa_niter_4": {"init": "pissa_niter_4"},
    "olora": {"init": "olora"},
    "patterns": PATTERNS,
    "dora and copies": {"use_dora": True, "modules_to_save": ["embed_in", "final_layer_norm"]},
    "pissa and copies": {"init": "pissa", "modules_to_save": ["final_layer_norm", "lm_head"]},
    "all at once": {"use_rslora": True, "use_dora": True, "init": "pissa", **PATTERNS},
}
IN_THE_BASE = ("pissa", "pissa and copies", "pissa_niter_4", "olora", "all at once")


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with weights, whose singular values are not all alike."""
    directory = tmp_path_factory.mktemp("base")
    source = ModelSource(
        path=str(tiny_model),
        init="random",
        model_type="gpt_neox",
        dtype=torch.float32,
        attn_implementation="sdpa",
        trust_remote_code=False,
        seed=5,
    )
    model = build_causal_lm(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(6.0 if "layers" in name and parameter.ndim == 2 else 1.0)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def built(base: Path, tiny_model: Path, example_tasks: list[str]) -> Callable[..., MFTModule]:
    """A module with its network, before or after its adapters have their values."""
    datamodule = MFTDataModule(data_paths=example_tasks, tokenizer_path=str(tiny_model))

    def build(dtype: str = "float32", complete: bool = True, sketched: bool = False, **lora: Any) -> MFTModule:
        settings = LoraSettings(**{"r": 4, "alpha": 8, "dropout": 0.0, **lora})
        module = MFTModule(pretrained_model_path=str(base), peft_type="lora", lora=settings, dtype=dtype)
        module.build(datamodule, sketched=sketched)
        assert module.built is not None
        if complete:
            module.built.complete()
        return module

    return build


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(input_ids=IDS).logits


def trained_a_little(module: MFTModule) -> torch.nn.Module:
    """Its network, whose adapters are no longer as they started."""
    assert module.network is not None
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return module.network.model


def saved(module: MFTModule, directory: Path) -> Path:
    assert module.built is not None and module.built.start is not None and module.network is not None
    model = module.network.model
    directory.mkdir(exist_ok=True)
    ours = trained_names(model)
    (directory / "config.json").write_text("{}")  # whose mode the weights' file gets
    state = {name: value for name, value in model.state_dict().items() if name in ours}
    ModelWriter(model, module.built.start.initial)(state, directory)
    return directory


def reopened(directory: Path, base: Path, dtype: torch.dtype = torch.float32) -> Any:
    """As a stranger opens it, over the base as it is on the disk."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, directory, autocast_adapter_dtype=False)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_adapter_changes_nothing(kind: str, built: Callable[..., MFTModule], base: Path) -> None:
    network = built(**KINDS[kind]).network
    assert network is not None
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    torch.testing.assert_close(logits(network.model), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_its_values_are_those_that_peft_gives(kind: str, built: Callable[..., MFTModule], base: Path) -> None:
    """All that is not drawn: the factors of a decomposition, the rest of the base, magnitudes."""
    network = built(**KINDS[kind]).network
    given = {"r": 4, "lora_alpha": 8, **KINDS[kind]}
    given["init_lora_weights"] = given.pop("init", True)
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    config = LoraConfig(**given, target_modules=targets, task_type="CAUSAL_LM")
    theirs: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    assert network is not None
    ours = network.model.state_dict()
    drawn = () if kind in IN_THE_BASE else (".lora_A.", ".lora_B.")
    drawn = (".lora_A.", ".lora_B.", ".base_layer.weight") if kind == "pissa_niter_4" else drawn
    for name, value in theirs.state_dict().items():
        assert ours[name].shape == value.shape
        if not any(part in name for part in drawn):
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)
    scales = {name: layer.scaling for name, layer in theirs.named_modules() if hasattr(layer, "lora_A")}
    live = {name: layer.scaling for name, layer in network.model.named_modules() if hasattr(layer, "lora_A")}
    assert live == scales and len(scales) == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_opens_with_peft_over_the_base_on_the_disk(
    kind: str, dtype: str, built: Callable[..., MFTModule], base: Path, tmp_path: Path
) -> None:
    """And is merged by peft: in float32 to 2e-5 of logits, in bfloat16 to its rounding."""
    module = built(dtype=dtype, **KINDS[kind])
    trained = logits(trained_a_little(module))
    held = getattr(torch, dtype)
    again = reopened(saved(module, tmp_path), base, held)
    bound = {"float32": 2e-5, "bfloat16": 0.25, "float64": 1e-10}[dtype]
    if kind not in IN_THE_BASE:
        assert torch.equal(logits(again), trained)
    torch.testing.assert_close(logits(again), trained, rtol=0, atol=bound)
    plain = logits(AutoModelForCausalLM.from_pretrained(base, dtype=held))
    assert (plain - trained).abs().max() > 2 * bound
    torch.testing.assert_close(logits(again.merge_and_unload()), trained, rtol=0, atol=bound)


def test_of_two_patterns_that_match_a_layer_the_same_one_counts_in_training_and_in_the_file(
    built: Callable[..., MFTModule], base: Path, tmp_path: Path
) -> None:
    """peft takes the first and saves them sorted: as they are written here, it could not open what it saved."""
    patterns = {"rank_pattern": {"dense": 2, "0.attention.dense": 8}, "alpha_pattern": {"dense": 2, ".*1.*dense": 64.0}}
    module = built(**patterns)
    trained = logits(trained_a_little(module))
    assert torch.equal(logits(reopened(saved(module, tmp_path), base)), trained)
    assert module.network is not None
    first = module.network.causal_lm.gpt_neox.layers[0].attention.dense
    assert first.r["default"] == 8 and first.scaling["default"] == 2 / 8


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"alpha_pattern": {"dense": 2.0, "layers.0.attention.dense": 4.0}}, "'layers.0.attention.dense' decides not"),
        ({"rank_pattern": {".*": 3, "dense": 5}}, "'dense' decides nothing"),
        ({"target_modules": ["query_key_value", "nothing.dense"]}, r"\['nothing.dense'\] is none of the linear layers"),
        ({"target_modules": ["layers.7.attention.dense"]}, "is none of the linear layers"),
    ],
)
def test_what_would_be_of_no_effect_is_refused(
    lora: dict[str, Any], said: str, built: Callable[..., MFTModule]
) -> None:
    with pytest.raises(UserError, match=said):
        built(complete=False, **lora)


@pytest.mark.parametrize("kind", IN_THE_BASE)
def test_a_checkpoint_gives_back_what_the_run_had_to_the_bit(
    kind: str, built: Callable[..., MFTModule], tmp_path: Path
) -> None:
    """The rest of the base too, from the factors in the checkpoint, on a machine whose LAPACK would find others."""
    module = built(**KINDS[kind])
    model = trained_a_little(module)
    directory = saved(module, tmp_path)
    other = built(complete=False, **KINDS[kind])
    assert other.built is not None and other.built.start is not None and other.network is not None
    state = load_state(other.network.model, directory)
    other.built.start.initial.update(load_initial(other.network.model, directory))
    other.built.start._decompose = None  # type: ignore[assignment,method-assign]  # none is to be asked
    other.built.complete()
    other.network.model.load_state_dict(state, strict=False)
    ours, again = model.state_dict(), other.network.model.state_dict()
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sketch_is_completed_to_the_same_bits(kind: str, built: Callable[..., MFTModule]) -> None:
    """Layer by layer, in another order, with other threads: as a sharding strategy does it on every rank."""
    whole, sketch = built(**KINDS[kind]), built(complete=False, sketched=True, **KINDS[kind])
    assert whole.network is not None and sketch.network is not None and sketch.built is not None
    torch.set_num_threads(2)
    for layer in reversed(sketch.network.causal_lm.gpt_neox.layers):
        sketch.built.complete(layer)
    sketch.built.complete()
    torch.set_num_threads(1)
    ours, again = whole.network.state_dict(), sketch.network.state_dict()
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    assert sketch.description == whole.description


@pytest.mark.parametrize("kind", ["default", *KINDS])
def test_the_base_is_told_by_its_weights_on_the_disk(kind: str, built: Callable[..., MFTModule], base: Path) -> None:
    module = built(**KINDS.get(kind, {}))
    plain: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["dense"]))
    assert module.description["frozen base (digest)"] == base_digest(base_state(plain))


def test_what_decides_an_adapter_is_said_and_the_rest_is_not(built: Callable[..., MFTModule]) -> None:
    """Of an adapter without any of these, what was said before there were any."""
    plain = "r 4, alpha 8, on dense, dense_4h_to_h, dense_h_to_4h, query_key_value"
    said = {kind: built(complete=False, **lora).description["model.lora"] for kind, lora in KINDS.items()}
    assert built(complete=False).description["model.lora"] == plain
    assert said["rslora"] == f"{plain}, use_rslora"
    assert said["olora"] == f"{plain}, init olora"
    assert said["all at once"] == (
        f"{plain}, use_rslora, use_dora, rank_pattern {{'0.attention.query_key_value': 6, 'dense': 3}}, "
        "alpha_pattern {'mlp.dense_h_to_4h': 2.5}, init pissa"
    )


def test_ranks_take_what_the_first_has_found(built: Callable[..., MFTModule], monkeypatch: pytest.MonkeyPatch) -> None:
    """No two hold parts of different decompositions: of another processor, the last bits and signs may differ."""
    told: list[torch.Tensor] = []
    monkeypatch.setattr("mft_lightning.ranks.take_from_first", lambda tensor: told.append(tensor.clone()))
    first = built(init="pissa")
    told_by_first, told = list(told), []
    monkeypatch.setattr("mft_lightning.ranks.is_first", lambda: False)
    monkeypatch.setattr("mft_lightning.ranks.take_from_first", lambda tensor: tensor.copy_(told_by_first.pop(0)))
    monkeypatch.setattr(LoraStart, "_decompose", None)
    second = built(init="pissa")
    assert first.network is not None and second.network is not None and second.built is not None
    ours, theirs = first.network.state_dict(), second.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert second.built.start is not None and not second.built.start.initial  # it writes no checkpoints
