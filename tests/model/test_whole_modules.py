"""Modules that train whole beside adapters, against peft's own forward; what cannot train so is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from mft_lightning.data.collate import MicroBatch
from mft_lightning.data.tokenizer import add_role_tokens, load_tokenizer
from mft_lightning.errors import UserError
from mft_lightning.model.base import base_digest, base_state
from mft_lightning.model.build import Built, make_network
from mft_lightning.model.export import ModelWriter, describe, load_state, trained_names
from mft_lightning.model.merging import MergedWeights, read_base
from mft_lightning.model.objective import Objective
from mft_lightning.model.optim import matrix_names
from mft_lightning.model.settings import LoraSettings
from mft_lightning.model.source import ModelSource
from mft_lightning.model.tensor_parallel import check_tensor_parallel
from mft_lightning.model.weight_files import open_adapter
from mft_lightning.model.weights import sketch
from mft_lightning.model.whole_modules import make_room, whole_modules

BOTH = ["embed_in", "lm_head"]
TARGETS = ["query_key_value", "dense"]


@pytest.fixture(scope="module")
def stored(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights, and as many rows as the examples' tokenizer has tokens."""
    directory = tmp_path_factory.mktemp("stored")
    shutil.copytree(tiny_model, directory, dirs_exist_ok=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).save_pretrained(directory)
    return directory


def built(path: Path, *, added: bool, sketched: bool = False, init: str = "pretrained", **lora: Any) -> Built:
    tokenizer = load_tokenizer(str(path))
    new = add_role_tokens(tokenizer) if added else []
    return make_network(
        ModelSource(
            path=str(path),
            init=init,  # type: ignore[arg-type]
            model_type="gpt_neox",
            dtype=torch.float64,
            attn_implementation="sdpa",
            trust_remote_code=False,
            seed=3,
        ),
        tokenizer,
        adapters=LoraSettings(**{"r": 4, "dropout": 0.0, "target_modules": TARGETS, **lora}),
        quantization=None,
        objective=Objective(),
        random_base="base",
        checkpoint_activations=False,
        pad_vocab_to_multiple_of=None,
        packed=True,
        new_tokens=len(new),
        sketched=sketched,
    )


def batch(length: int = 40) -> MicroBatch:
    """One conversation over all rows, new ones too, of which every second token is supervised."""
    ids = torch.randint(515, (1, length), generator=torch.Generator().manual_seed(1))
    ids[0, :3] = torch.tensor([512, 513, 514])
    predictors = torch.arange(0, length - 1, 2)
    return MicroBatch(
        input_ids=ids,
        position_ids=torch.arange(length)[None],
        predictors=predictors,
        targets=ids[0, predictors + 1],
        conversation=torch.zeros_like(predictors),
        tasks=torch.zeros(1, dtype=torch.int64),
        n_supervised=torch.tensor([len(predictors)]),
        numbers=torch.zeros(1, dtype=torch.int64),
        packed_lengths=(),
    )


def test_loss_and_gradients_are_those_of_pefts_forward(stored: Path, tmp_path: Path) -> None:
    """A stranger's model of base and adapter, its own logits, and torch's cross entropy, in float64."""
    made = built(stored, added=True)
    network = made.network
    with torch.no_grad():  # away from where an adapter is nothing, and a copy its original
        for parameter in (p for p in network.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.05)
    trained = {name: network.model.state_dict()[name] for name in trained_names(network.model)}
    ModelWriter(network.model)(trained, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(base, str(tmp_path))
    base = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float64)
    base.resize_token_embeddings(515)
    theirs = PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True, autocast_adapter_dtype=False).train()

    micro = batch()
    for budget in (None, 3 * 4 * 515):  # all tokens at once, and three
        network.logit_budget = budget
        network.zero_grad()
        theirs.zero_grad()
        found = network(micro).loss
        found.backward()
        logits = theirs(input_ids=micro.input_ids, use_cache=False).logits[0, micro.predictors]
        expected = F.cross_entropy(logits, micro.targets, reduction="sum")
        expected.backward()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        ours = {name: p.grad for name, p in network.model.named_parameters() if p.grad is not None}
        wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
        assert ours.keys() == wanted.keys() == trained.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], wanted[name], rtol=1e-9, atol=1e-12)
        assert ours["base_model.model.gpt_neox.embed_in.modules_to_save.default.weight"][512:].abs().min() > 0


@pytest.mark.parametrize("init", ["pretrained", "random"])
@pytest.mark.parametrize("added", [True, False])
def test_a_sketch_comes_to_the_same_and_names_the_same_base(stored: Path, init: str, added: bool) -> None:
    lora = {} if added else {"modules_to_save": ["lm_head", "final_layer_norm"]}
    whole = built(stored, added=added, init=init, **lora)
    sketched = built(stored, added=added, init=init, sketched=True, **lora)
    digest = base_digest(sketched.base)
    assert digest == base_digest(whole.base)
    if init == "pretrained":  # the directory as it is, whatever rows were added
        theirs = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float64)
        assert digest == base_digest(base_state(theirs))
    sketched.complete()
    ours, theirs = sketched.network.state_dict(), whole.network.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    copies = [name for name in ours if "modules_to_save" in name]
    assert len(copies) == (2 if added else 3)
    for name in copies:
        original = name.replace("modules_to_save.default", "original_module")
        assert torch.equal(ours[name], ours[original]) and ours[name].data_ptr() != ours[original].data_ptr()
    model = sketched.network.model
    assert {f"model.{name}" for name in trained_names(model)} >= set(copies)
    assert not any("original_module" in name for name in trained_names(model))
    assert {name for name in copies if "norm" not in name} <= matrix_names(sketched.network)  # these decay
    said = describe(model, sketched.network.causal_lm, whole.base)["model.lora"]
    named = "embed_in, lm_head" if added else "final_layer_norm, lm_head"
    assert said == f"r 4, alpha 32, on dense, query_key_value, whole: {named}"


@pytest.fixture(scope="module")
def grown(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with embeddings and head for new tokens, 576 rows of them, whose values are no base's."""
    directory = tmp_path_factory.mktemp("grown")
    base: Any = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float64)
    base.resize_token_embeddings(576)
    config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=BOTH, task_type="CAUSAL_LM")
    theirs: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.05)
    theirs.save_pretrained(directory)
    return directory


def test_what_peft_saves_twice_is_merged_as_peft_merges_it(stored: Path, grown: Path) -> None:
    """Embeddings that grew, and train whole: by three names each, of which two are within peft's model."""
    names = load_file(grown / "adapter_model.safetensors").keys()
    assert "base_model.model.lm_head.modules_to_save.weight" in names
    assert "base_model.model.gpt_neox.embed_in.original_module.weight" in names
    base = read_base(str(stored), torch.float64, "base")
    ours = MergedWeights(grown, base, torch.float64, torch.device("cpu"), "adapter")
    theirs: Any = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float64)
    theirs.resize_token_embeddings(576)
    merged = PeftModel.from_pretrained(theirs, str(grown), autocast_adapter_dtype=False).merge_and_unload()
    assert len(ours) == len(merged.state_dict())
    assert all(torch.equal(value, ours[name]) for name, value in merged.state_dict().items())


@pytest.mark.parametrize("sketched", [False, True])
def test_copies_start_from_those_of_another_adapter(stored: Path, grown: Path, sketched: bool) -> None:
    """As many rows as it has, whatever the tokenizer needs; over a base that is still told as it is on the disk."""
    made = built(stored, added=True, sketched=sketched, r=96, start_from=str(grown), target_modules=None)
    theirs = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float64)
    assert base_digest(made.base) == base_digest(base_state(theirs))
    for layer in made.network.causal_lm.gpt_neox.layers if sketched else ():
        made.complete(layer)  # as a sharding strategy does
    made.complete()
    model: Any = made.network.model
    theirs.resize_token_embeddings(576)
    adapted: Any = PeftModel.from_pretrained(theirs, str(grown), is_trainable=True, autocast_adapter_dtype=False)
    names = trained_names(model)
    assert names == {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(torch.equal(model.state_dict()[name], adapted.state_dict()[name]) for name in names)
    copied = model.get_output_embeddings().weight.detach().clone()
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1.0)
    made.complete()  # again, which leaves alone what trains
    assert torch.equal(model.get_output_embeddings().weight, copied + 1.0)
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(copied)
        ids = batch().input_ids
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)


def test_copies_of_another_adapter_that_do_not_fit_are_refused(stored: Path, grown: Path, tmp_path: Path) -> None:
    def message(directory: Path, **lora: Any) -> str:
        with pytest.raises(UserError) as raised:
            built(stored, added=True, sketched=True, r=96, target_modules=None, start_from=str(directory), **lora)
        return str(raised.value)

    assert "modules_to_save: is ['lm_head'], but ['embed_in', 'lm_head'] in" in message(
        grown, modules_to_save=["lm_head"]
    )
    assert "modules_to_save: is [], but" in message(grown, modules_to_save=[])
    shutil.copytree(grown, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, said in (
        ({"modules_to_save": ["mlp"]}, "cannot be trained here: model.lora.modules_to_save: 'mlp' is none of"),
        ({"modules_to_save": ["embed_in"]}, "leaves out lm_head"),
        ({"modules_to_save": 3}, "cannot be used ("),
        ({"modules_to_save": [*BOTH, "final_layer_norm"]}, "holds other weights than this run's model (2 differ"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        assert said in message(tmp_path)
    config["modules_to_save"] = None
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    held = load_file(tmp_path / "adapter_model.safetensors")
    held = {name: value for name, value in held.items() if "lora_" in name}
    save_file(held, tmp_path / "adapter_model.safetensors")
    assert "has no rows for the tokenizer's 515 tokens, but for 512" in message(tmp_path)


def test_what_is_written_is_read_again_and_the_files_name_no_original(stored: Path, tmp_path: Path) -> None:
    model = built(stored, added=True).network.model
    state = {name: model.state_dict()[name] for name in trained_names(model)}
    writer = ModelWriter(model)
    writer(state, tmp_path)
    again = load_state(model, tmp_path)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    places = {writer.place(name) for name in state}
    assert {"base_model.model.gpt_neox.embed_in.weight", "base_model.model.lm_head.weight"} <= places
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == BOTH
    described = tmp_path / "described"
    described.mkdir()
    writer.describe(described)
    assert [file.name for file in described.iterdir()] == ["adapter_config.json"]
    base = AutoModelForCausalLM.from_pretrained(stored)
    make_room(base, open_adapter(tmp_path))
    assert base.get_input_embeddings().num_embeddings == base.config.vocab_size == 515


def test_nothing_trains_whole_unless_tokens_are_new(stored: Path) -> None:
    model = built(stored, added=False).network
    assert not any("modules_to_save" in name for name in model.state_dict())
    said = describe(model.model, model.causal_lm, {})["model.lora"]
    assert said == "r 4, alpha 32, on dense, query_key_value"  # as checkpoints from before have it


def test_names_are_taken_as_they_are_given(stored: Path) -> None:
    model = sketch(AutoConfig.from_pretrained(stored), torch.float32)

    def names(asked: list[str] | None, new_tokens: int = 0) -> list[str]:
        return whole_modules(model, asked, TARGETS, new_tokens=new_tokens, grown=False)

    assert names(None) == [] and names(None, 3) == BOTH and names([], 3) == []
    assert names(["gpt_neox.embed_in"]) == ["gpt_neox.embed_in"]
    assert names(["layers.1.mlp.dense_4h_to_h"]) == ["layers.1.mlp.dense_4h_to_h"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["nothing"], r"'nothing' is none of the layers dense, dense_4h_to_h, .*embed_in, .*lm_head"),
        (["in"], r"'in' is none of the layers"),  # of which peft would take embed_in
        ([""], r"'' is none of the layers"),
        (["layers"], r"'layers' is none of the layers"),
        (["mlp"], r"'mlp' is none of the layers"),
        (["rotary_emb"], r"'rotary_emb' is none of the layers"),
        (["dense"], r"dense gets an adapter \(model\.lora\.target_modules\)"),
        (["embed_in"], r"\['embed_in'\] leaves out lm_head\. The tokenizer has more tokens"),
        ([], r"\[\] leaves out embed_in and lm_head\."),
    ],
)
def test_what_cannot_train_whole_is_refused(stored: Path, asked: list[str], message: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.lora\.modules_to_save: {message}"):
        built(stored, added=True, modules_to_save=asked, sketched=True)


@pytest.mark.parametrize("asked", [None, [], ["lm_head"]])
def test_one_matrix_for_embeddings_and_head_is_refused(stored: Path, tmp_path: Path, asked: list[str] | None) -> None:
    """Where rows must be added nothing is offered that is refused in its turn."""
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is tied: one matrix is the model's embeddings and its head") as caught:
        built(tmp_path, added=True, modules_to_save=asked, init="random", sketched=True)
    assert "a base with room for them, data.role_tokens: text, or train all weights" in str(caught.value)
    assert "[]" not in str(caught.value) and "Leave" not in str(caught.value)


def test_what_several_devices_cut_does_not_train_whole(stored: Path) -> None:
    config = AutoConfig.from_pretrained(stored)
    check_tensor_parallel(config, 2, BOTH)
    check_tensor_parallel(config, 1, ["dense"])
    with pytest.raises(UserError, match=r"modules_to_save: dense is cut by parallel\.tensor_parallel_size"):
        check_tensor_parallel(config, 2, ["dense"])


def test_pefts_own_model_has_the_same_names(stored: Path) -> None:
    config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=BOTH, task_type="CAUSAL_LM")
    theirs: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(stored), config)
    ours = built(stored, added=False, modules_to_save=BOTH).network.model
    assert trained_names(ours) == {name for name, p in theirs.named_parameters() if p.requires_grad}
