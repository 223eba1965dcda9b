"""Models come from a directory in the asked dtype, or from the seed; what is no causal LM is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification

from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.errors import NotYetError, UserError
from mft_lightning.model.base import base_state
from mft_lightning.model.build import count_parameters, name_special_tokens
from mft_lightning.model.module import MFTModule
from mft_lightning.model.seeding import seeded
from mft_lightning.model.settings import LoraSettings
from mft_lightning.model.source import ModelSource, build_causal_lm
from mft_lightning.model.weights import grow_embeddings
from mft_lightning.model.whole_modules import find_room


def source(path: Path, init: str = "pretrained", dtype: torch.dtype = torch.float32, seed: int = 42) -> ModelSource:
    return ModelSource(
        path=str(path),
        init=init,
        model_type="gpt_neox",
        dtype=dtype,
        attn_implementation="sdpa",
        trust_remote_code=False,
        seed=seed,
    )


@pytest.fixture
def half_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A directory whose weights are stored in float16, as the published Pythia models are."""
    directory = tmp_path / "half"
    shutil.copytree(tiny_model, directory)
    build_causal_lm(source(tiny_model, "random")).half().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_come_in_the_asked_dtype_not_in_the_files(half_model: Path, dtype: torch.dtype) -> None:
    model = build_causal_lm(source(half_model, dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.training
    stored = GPTNeoXForCausalLM.from_pretrained(half_model, dtype=torch.float16)
    torch.testing.assert_close(model.lm_head.weight, stored.lm_head.weight.to(dtype), rtol=0, atol=1e-2)


def test_a_random_model_depends_on_the_seed_alone(tiny_model: Path) -> None:
    torch.manual_seed(1)
    first = build_causal_lm(source(tiny_model, "random")).state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again = build_causal_lm(source(tiny_model, "random")).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    other = build_causal_lm(source(tiny_model, "random", seed=43)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_directory_without_weights_names_model_init(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"model\.init: random"):
        build_causal_lm(source(tiny_model))


def test_missing_weights_are_not_drawn_at_random(half_model: Path) -> None:
    GPTNeoXForCausalLM.from_pretrained(half_model).gpt_neox.save_pretrained(half_model)
    config = json.loads((half_model / "config.json").read_text()) | {"architectures": ["GPTNeoXForCausalLM"]}
    (half_model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks 1 weights of the model, first lm_head"):
        build_causal_lm(source(half_model))


def test_damaged_weights_are_an_error(half_model: Path) -> None:
    file = half_model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        build_causal_lm(source(half_model))


def test_a_model_that_is_no_causal_lm_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    classifier = tmp_path / "classifier"
    GPTNeoXForSequenceClassification(build_causal_lm(source(tiny_model, "random")).config).save_pretrained(classifier)
    with pytest.raises(UserError, match="GPTNeoXForSequenceClassification, which is no causal"):
        build_causal_lm(source(classifier))
    bert = tmp_path / "bert"
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(bert)
    with pytest.raises(UserError, match="no causal language model"):
        build_causal_lm(source(bert))


def test_another_model_type_must_be_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(UserError, match=r"model\.model_type: gpt2"):
        build_causal_lm(source(tmp_path))


def test_embeddings_grow_only_where_the_tokenizer_needs_it(tiny_model: Path, example_tasks: list[str]) -> None:
    tokenizer = MFTDataModule(data_paths=example_tasks, tokenizer_path=str(tiny_model)).tokenizer
    model = build_causal_lm(source(tiny_model, "random"))
    name_special_tokens(model, tokenizer)
    assert find_room(model, len(tokenizer), 64, None) is None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    tokenizer.add_tokens(["<|new|>"])
    room = find_room(model, len(tokenizer), 64, None)
    assert room is not None
    grow_embeddings(model, *room, seed=0)
    assert model.get_input_embeddings().num_embeddings == 576


def test_new_embeddings_do_not_depend_on_threads(tiny_model: Path, example_tasks: list[str]) -> None:
    tokenizer = MFTDataModule(data_paths=example_tasks, tokenizer_path=str(tiny_model)).tokenizer
    tokenizer.add_tokens([f"<|{number}|>" for number in range(4096)])
    rows, before = [], torch.get_num_threads()
    for threads in (1, 4):
        with seeded(0):
            model = GPTNeoXForCausalLM(
                GPTNeoXConfig(
                    vocab_size=4096, num_attention_heads=8, hidden_size=512, num_hidden_layers=1, intermediate_size=64
                )
            )
        torch.set_num_threads(threads)
        grow_embeddings(model, len(tokenizer), 64, seed=0)
        assert torch.get_num_threads() == threads
        torch.set_num_threads(before)
        rows.append(model.get_input_embeddings().weight[4096:].clone())
    assert torch.equal(*rows)


def test_lora_trains_the_adapters_on_the_four_projections_and_leaves_the_base(
    tiny_model: Path, example_tasks: list[str]
) -> None:
    datamodule = MFTDataModule(data_paths=example_tasks, tokenizer_path=str(tiny_model))
    lora = MFTModule(
        pretrained_model_path=str(tiny_model), init="random", peft_type="lora", lora=LoraSettings(r=4)
    ).build(datamodule, random_base="/somewhere/base")
    trained = {name for name, p in lora.model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == {
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    }
    assert lora.model.peft_config["default"].base_model_name_or_path == "/somewhere/base"
    plain = build_causal_lm(source(tiny_model, "random")).state_dict()
    base = base_state(lora.model)
    assert base.keys() == plain.keys() and all(torch.equal(base[name], plain[name]) for name in plain)
    trainable, total = count_parameters(lora)
    assert total - trainable == sum(p.numel() for p in plain.values())
    again = MFTModule(
        pretrained_model_path=str(tiny_model), init="random", peft_type="lora", lora=LoraSettings(r=4)
    ).build(datamodule)
    assert all(torch.equal(p, q) for p, q in zip(lora.parameters(), again.parameters(), strict=True))


def test_an_unknown_lora_target_is_named(tiny_model: Path, example_tasks: list[str]) -> None:
    datamodule = MFTDataModule(data_paths=example_tasks, tokenizer_path=str(tiny_model))
    lora = LoraSettings(target_modules=["query_key_value", "q_proj"])
    module = MFTModule(pretrained_model_path=str(tiny_model), init="random", peft_type="lora", lora=lora)
    with pytest.raises(UserError, match="q_proj"):
        module.build(datamodule)


def test_what_is_not_there_yet_is_refused() -> None:
    with pytest.raises(NotYetError):
        MFTModule(pretrained_model_path="x", attn_implementation="flex_attention")


def test_task_weights_need_a_loss_that_weighs_tasks(tiny_model: Path, example_tasks: list[str]) -> None:
    datamodule = MFTDataModule(
        data_paths=example_tasks, tokenizer_path=str(tiny_model), task_weights=[1, 2, 3], seq_length=64
    )
    for mode, fits in (("case1", False), ("case2", False), ("case3", True), ("case4", True)):
        module = MFTModule(pretrained_model_path=str(tiny_model), init="random", weighted_loss_mode=mode)
        if fits:
            module.check(datamodule)
        else:
            with pytest.raises(UserError, match=r"data\.task_weights"):
                module.check(datamodule)


def test_more_positions_than_the_model_has_are_refused(tiny_model: Path, example_tasks: list[str]) -> None:
    datamodule = MFTDataModule(data_paths=example_tasks, tokenizer_path=str(tiny_model), seq_length=513)
    with pytest.raises(UserError, match="512 positions"):
        MFTModule(pretrained_model_path=str(tiny_model), init="random").check(datamodule)


@pytest.mark.parametrize(
    ("target", "computed"), [("1.attention.query_key_value", [1, 2]), ("mlp.dense_4h_to_h", [2, 2])]
)
def test_layers_below_the_first_adapter_are_not_computed_again(
    tiny_model: Path, example_tasks: list[str], target: str, computed: list[int]
) -> None:
    datamodule = MFTDataModule(data_paths=example_tasks, tokenizer_path=str(tiny_model), seq_length=256, num_workers=0)
    ids, gradients = torch.arange(2, 42)[None], []
    for again in (False, True):
        lora = LoraSettings(r=4, dropout=0.0, target_modules=[target])
        options: Any = {"init": "random", "peft_type": "lora", "lora": lora, "checkpoint_activations": again}
        lm = MFTModule(pretrained_model_path=str(tiny_model), **options).build(datamodule).causal_lm.train()
        times = [0, 0]
        for number, layer in enumerate(lm.base_model.layers):

            def count(*_: object, number: int = number, times: list[int] = times) -> None:
                times[number] += 1

            layer.attention.register_forward_pre_hook(count)
        embedded = []
        lm.get_input_embeddings().register_forward_hook(lambda *given, seen=embedded: seen.append(given[-1]))
        states = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        states.square().sum().backward()
        assert times == (computed if again else [1, 1])
        assert not embedded[0].requires_grad
        gradients.append([parameter.grad for parameter in lm.parameters() if parameter.grad is not None])
    assert len(gradients[0]) >= 1 and all(map(torch.equal, *gradients))
