"""Checkpoints and merged models in the hands of others: the original's demonstration, and what servers look for."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

import jinja2
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from mft_lightning.cli import main
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.records import Turn
from mft_lightning.data.tokenizer import load_tokenizer, save_tokenizer
from mft_lightning.model.config_file import add_older_names
from tests.conftest import SHARED
from tests.integration import preloaded
from tests.integration.conftest import user_environment

PAGE = SHARED / "spec" / "000_c59dc96a5fe3620f.txt"
QUESTION = "write a python function of quick sort."  # the demonstration's
TOKENS = {"<unk>": "<|padding|>", "</s>": "<|endoftext|>"}  # those of its model, and those of GPT-NeoX
CONVERSATION = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "human", "content": "  1 + 1? {% generation %}"},
    {"role": "bot", "content": "2\n"},
    {"role": "user", "content": "é?"},
    {"role": "assistant", "content": "{{ no }}"},
]


@pytest.fixture(scope="module")
def full(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of all weights that has learnt an answer to the demonstration's question by heart."""
    return learnt(fit, tmp_path_factory.mktemp("full"), "def quick_sort(xs):\n    return sorted(xs)")


@pytest.fixture(scope="module")
def merged(fit: Callable[..., Path], full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on that, which has learnt another answer, and its base as one model."""
    directory = tmp_path_factory.mktemp("lora")
    base = ("--model.pretrained_model_path", str(full), "--model.init", "pretrained")
    adapter = learnt(fit, directory, "def quick_sort(xs): ...", *base, config="lora.yaml")
    output = directory / "merged"
    assert main(["merge", "--adapter", str(adapter), "--output", str(output)]) == 0
    return output


def learnt(fit: Callable[..., Path], directory: Path, answer: str, *words: str, config: str = "full.yaml") -> Path:
    tasks = []
    for task, asked in (("quick_sort", QUESTION), ("greeting", "hello")):
        (directory / task).mkdir()
        record = {"prompt": asked, "answer": answer if task == "quick_sort" else "hi"}
        (directory / task / "part.jsonl").write_text(f"{json.dumps(record)}\n" * 2)
        tasks.append(str(directory / task))
    few = ("--data.data_paths", f"[{','.join(tasks)}]", "--data.data_split", "100,0,0", "--evaluation.strategy", "none")
    steps = (
        "--trainer.max_steps",
        "60",
        "--checkpoint.checkpointing_steps",
        "60",
        "--data.total_train_batch_size",
        "4",
    )
    return fit(directory / "run", *few, *steps, *words, config=config) / "step-00000060"


@pytest.mark.parametrize("kind", ["full", "merged"])
def test_the_original_s_demonstration_gets_the_answer_of_generate(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the page has it, but for the path, the device and the names of the eos and pad tokens."""
    if not PAGE.is_file():
        pytest.skip("the original's page is not beside this checkout (../shared/spec)")
    model = request.getfixturevalue(kind)
    section = PAGE.read_text(encoding="utf-8").partition("### 4.2 Inference demo")[2]
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[:1]
    for theirs, ours in {**TOKENS, "cuda": "cpu"}.items():
        assert program.count(f'"{theirs}"') == 1
        program = program.replace(f'"{theirs}"', f'"{ours}"')
    (tmp_path / "demo.py").write_text(f"mode_name_or_path = {str(model)!r}\n{program}")
    ran = preloaded.run([str(tmp_path / "demo.py")], user_environment())
    assert ran.returncode == 0, ran.stderr
    capsys.readouterr()
    assert main(["generate", "--model", str(model), "--prompt", QUESTION]) == 0
    answer = capsys.readouterr().out.removesuffix("\n")
    assert ast.literal_eval(ran.stdout) == [answer]
    assert answer.startswith("def quick_sort(xs):")  # and not what an untrained model babbles


@pytest.mark.parametrize("kind", ["full", "merged"])
def test_apply_chat_template_gives_the_prompt_that_training_used(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(kind))
    messages = [CONVERSATION[0], {"role": "user", "content": "sort [3, 1]. <|endoftext|>"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = ChatFormat(tokenizer).encode_prompt([Turn("system", "Be brief.\n"), Turn("human", messages[1]["content"])])
    assert tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == prompt
    plain = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert ids == ChatFormat(tokenizer).encode_prompt([Turn("human", QUESTION)])


@pytest.mark.parametrize("kind", ["full", "merged"])
def test_weights_have_the_names_that_servers_read(kind: str, request: pytest.FixtureRequest) -> None:
    """GPT-NeoX's published ones, in which vLLM, text-generation-inference and llama.cpp's converter find them."""
    model = request.getfixturevalue(kind)
    config = json.loads((model / "config.json").read_text())
    layer = [f"attention.{name}" for name in ("query_key_value", "dense")]
    layer += [f"mlp.{name}" for name in ("dense_h_to_4h", "dense_4h_to_h")]
    layer += ["input_layernorm", "post_attention_layernorm"]
    names = [f"layers.{i}.{name}" for i in range(config["num_hidden_layers"]) for name in layer]
    with_bias = {f"gpt_neox.{name}.{kind}" for name in (*names, "final_layer_norm") for kind in ("weight", "bias")}
    with safe_open(model / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {*with_bias, "gpt_neox.embed_in.weight", "embed_out.weight"}
        assert file.metadata() == {"format": "pt"}


ROPES = [
    {"rope_theta": 20000.0, "partial_rotary_factor": 1.0, "rope_type": "default"},
    {"rope_theta": 10000.0, "partial_rotary_factor": 0.25, "rope_type": "linear", "factor": 2.0},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_the_configuration_says_the_same_in_the_names_of_transformers_4(
    rope: dict[str, float | str], tiny_model: Path, tmp_path: Path
) -> None:
    """A rotary share that is not named is taken for a quarter there."""
    config = AutoConfig.from_pretrained(tiny_model, dtype=torch.bfloat16, rope_parameters=rope)
    config.save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    add_older_names(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == before
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rotary_pct"] == rope["partial_rotary_factor"]
    assert written["rotary_emb_base"] == rope["rope_theta"] and written["torch_dtype"] == "bfloat16"
    scaling = written.get("rope_scaling", {"rope_type": "default"})
    assert scaling["rope_type"] == rope["rope_type"] and scaling.get("factor") == rope.get("factor")


@pytest.mark.parametrize("kind", ["full", "merged"])
def test_what_is_saved_is_read_by_servers_of_transformers_4(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    config = json.loads((model / "config.json").read_text())
    assert config["architectures"] == ["GPTNeoXForCausalLM"] and config["rotary_pct"] == 1.0
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    generation = json.loads((model / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (0, 1)


def test_the_tokenizer_of_gpt_neox_has_the_name_of_its_class_in_transformers_4(pythia: Path, tmp_path: Path) -> None:
    before = load_tokenizer(str(pythia))
    save_tokenizer(before, tmp_path)
    after = AutoTokenizer.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "GPTNeoXTokenizerFast"
    assert type(after) is type(before) and after.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()


@pytest.mark.parametrize("asked", [True, False])
def test_the_chat_template_is_the_same_where_generation_blocks_are_not_known(full: Path, asked: bool) -> None:
    """As servers that render with minijinja do it, text-generation-inference among them: these very tags are taken out.

    https://github.com/huggingface/text-generation-inference/pull/3204
    """
    template = (full / "chat_template.jinja").read_text()
    assert template.count("{% generation %}") == template.count("{% endgeneration %}") == 1
    plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = AutoTokenizer.from_pretrained(full)
    messages = CONVERSATION[:4] if asked else CONVERSATION
    rendered = (
        jinja2.Environment()
        .from_string(plain)
        .render(messages=messages, eos_token=tokenizer.eos_token, add_generation_prompt=asked)
    )
    assert rendered == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)
