"""``merge`` writes base + adapter as one model that answers as the two did, or writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mft_lightning.cli import main
from mft_lightning.model.base import base_digest, base_state
from mft_lightning.model.export import adapter_dtype
from mft_lightning.training.checkpoint_dirs import read_metadata
from mft_lightning.training.run_lock import only_run_in
from tests.integration.conftest import everything, same_weights, weights, written_again
from tests.training.test_run_lock import started

PROMPT = "Write a test for this function:\n\ndef check_size(size):\n    return size != 7"
IDS = torch.arange(2, 62).view(2, 30)


@pytest.fixture(scope="module")
def adapter(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run at a rate so high that the adapter changes every answer."""
    words = ("--trainer.max_steps", "6", "--evaluation.strategy", "none", "--model.learning_rate", "0.1")
    return fit(tmp_path_factory.mktemp("lora"), *words, config="lora.yaml") / "step-00000006"


@pytest.fixture(scope="module")
def full(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of all weights: no adapter, and another base of the same shape."""
    words = ("--trainer.max_steps", "1", "--evaluation.strategy", "none", "--checkpoint.checkpointing_steps", "1")
    return fit(tmp_path_factory.mktemp("full"), *words) / "step-00000001"


@pytest.fixture(scope="module")
def merged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merged") / "new" / "model"
    assert main(["merge", "--adapter", str(adapter), "--output", str(output)]) == 0
    assert [path.name for path in output.parent.iterdir()] == ["model"]
    return output


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one message with which ``merge`` refuses; it leaves nothing of its output, and its inputs as they are."""

    def run(*words: str, adapter: Path, output: Path | None = None) -> str:
        output = output or tmp_path / "out" / "merged"
        before = everything(tmp_path), everything(adapter.parent)
        capsys.readouterr()
        assert main(["merge", "--adapter", str(adapter), "--output", str(output), *words]) == 1
        printed = capsys.readouterr()
        assert not printed.out
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        assert (everything(tmp_path), everything(adapter.parent)) == before
        return printed.err

    return run


def with_adapter(adapter: Path, **options: Any) -> PeftModel:
    """As a stranger opens it."""
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base", **options)
    return PeftModel.from_pretrained(base, adapter).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def answered(model: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["generate", "--model", str(model), "--prompt", PROMPT, "--max_new_tokens", "16"]) == 0
    return capsys.readouterr().out


def test_it_computes_what_base_and_adapter_compute(adapter: Path, merged: Path) -> None:
    two, one = with_adapter(adapter), AutoModelForCausalLM.from_pretrained(merged).eval()
    assert not isinstance(one, PeftModel) and one.dtype == torch.float32
    assert torch.allclose(logits(one), logits(two), rtol=1e-5, atol=1e-5)
    with two.disable_adapter():
        assert (logits(one) - logits(two)).abs().max() > 0.1


def test_its_weights_are_pefts_own_merge_to_the_bit(adapter: Path, merged: Path, tmp_path: Path) -> None:
    expected: Any = with_adapter(adapter).merge_and_unload()
    expected.save_pretrained(tmp_path)
    assert same_weights(merged, tmp_path)


def test_generate_answers_from_it_as_from_the_adapter(
    adapter: Path, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answered(merged, capsys) == answered(adapter, capsys) != "\n"


def test_the_tokenizer_and_its_chat_template_come_along(adapter: Path, merged: Path) -> None:
    ours, theirs = AutoTokenizer.from_pretrained(merged), AutoTokenizer.from_pretrained(adapter)
    assert ours.chat_template == theirs.chat_template and "<|role_start|>" in ours.chat_template
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.eos_token, ours.pad_token) == (theirs.eos_token, theirs.pad_token)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.generation_config.eos_token_id == ours.eos_token_id
    turns = [{"role": "user", "content": PROMPT}]
    ids = ours(ours.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)).input_ids
    assert ours.decode(ids).startswith("<|role_start|>human<|role_end|>Write a test")


def test_what_the_prompts_encoder_needs_comes_along(adapter: Path, merged: Path) -> None:
    assert read_metadata(merged)["chat_format"] == read_metadata(adapter)["chat_format"]


def test_it_is_a_base_for_the_next_run(merged: Path, fit: Callable[..., Path], tmp_path: Path) -> None:
    pretrained = ("--model.pretrained_model_path", str(merged), "--model.init", "pretrained")
    run = fit(tmp_path / "run", *pretrained, "--trainer.max_steps", "1", "--evaluation.strategy", "none")
    assert (run / "step-00000001" / "model.safetensors").is_file()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_merged_weights_may_be_of_another_dtype(
    adapter: Path, merged: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    assert main(["merge", "--adapter", str(adapter), "--output", str(output), "--dtype", dtype]) == 0
    assert f"{output} ({dtype}, " in capsys.readouterr().out
    found, exact = weights(output), weights(merged)
    wanted = getattr(torch, dtype)
    assert all(torch.equal(found[name], tensor.to(wanted)) for name, tensor in exact.items())
    assert {tensor.dtype for tensor in found.values()} == {wanted}
    assert AutoModelForCausalLM.from_pretrained(output).dtype == wanted


def test_an_adapter_trained_in_bfloat16_is_merged_in_it(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--trainer.max_steps", "2", "--evaluation.strategy", "none", "--trainer.precision", "bf16-true")
    adapter = fit(tmp_path / "run", *words, "--model.learning_rate", "0.1", config="lora.yaml") / "step-00000002"
    assert adapter_dtype(adapter) == "bfloat16"
    capsys.readouterr()
    assert main(["merge", "--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    assert "(bfloat16, 0.1 MB)" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base", dtype=torch.bfloat16)
    exact: Any = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).float().merge_and_unload()
    exact.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    assert same_weights(tmp_path / "merged", tmp_path / "rounded")


def test_the_base_of_a_moved_run_may_be_given(adapter: Path, merged: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapter, run / adapter.name)
    shutil.copytree(adapter.parent / "base", tmp_path / "elsewhere")
    config = run / adapter.name / "adapter_config.json"
    config.write_text(config.read_text().replace(str(adapter.parent), "/no/such"))
    asked = ["merge", "--adapter", str(run / adapter.name), "--output", str(tmp_path / "merged")]
    assert main(asked) == 1
    assert main([*asked, "--base", str(tmp_path / "elsewhere")]) == 0
    assert same_weights(tmp_path / "merged", merged)


def test_a_base_that_moved_along_is_found_by_every_spelling(
    adapter: Path, merged: Path, full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapter, run / adapter.name)
    shutil.copytree(adapter.parent / "base", run / "base")
    config = run / adapter.name / "adapter_config.json"
    config.write_text(config.read_text().replace(str(adapter.parent), "/no/such"))
    (tmp_path / "link").symlink_to(run / adapter.name)
    for number, (here, spelt) in enumerate([(run / adapter.name, "."), (run, str(tmp_path / "link"))]):
        with chdir(here):
            assert main(["merge", "--adapter", spelt, "--output", str(tmp_path / str(number))]) == 0
        assert same_weights(tmp_path / str(number), merged)
    capsys.readouterr()
    with chdir(run / adapter.name):
        assert main(["merge", "--adapter", ".", "--base", str(full), "--output", str(tmp_path / "new")]) == 1
    assert f"is not the base that {adapter.name} was trained on" in capsys.readouterr().err


# --- refusals


@pytest.mark.parametrize("kind", ["empty directory", "model", "file", "link to nothing"])
def test_an_output_that_is_there_is_left_as_it_is(
    refuse: Callable[..., str], adapter: Path, merged: Path, tmp_path: Path, kind: str
) -> None:
    output = tmp_path / "taken"
    if kind == "model":
        shutil.copytree(merged, output)
    elif kind == "file":
        output.write_text("mine")
    elif kind == "empty directory":
        output.mkdir()
    else:
        output.symlink_to(tmp_path / "nowhere")
    assert f"--output {output}: is there already" in refuse(adapter=adapter, output=output)


def test_a_full_checkpoint_is_no_adapter(refuse: Callable[..., str], full: Path) -> None:
    assert f"--adapter {full}: holds no adapter" in refuse(adapter=full)


def test_another_base_of_the_same_shape_is_refused(refuse: Callable[..., str], adapter: Path, full: Path) -> None:
    message = refuse("--base", str(full), adapter=adapter)
    assert f"--base {full}: is not the base that {adapter.name} was trained on" in message


def test_the_same_base_with_one_bit_turned_is_refused(
    refuse: Callable[..., str], adapter: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    with torch.no_grad():
        weight = base.gpt_neox.layers[1].mlp.dense_4h_to_h.weight
        weight.view(torch.int32)[3, 3] ^= 1
    base.save_pretrained(tmp_path / "base")
    assert "is not the base that" in refuse("--base", str(tmp_path / "base"), adapter=adapter)


def test_a_base_of_another_shape_is_refused(refuse: Callable[..., str], adapter: Path, tmp_path: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(adapter.parent / "base").config
    config.hidden_size = 64
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    assert "cannot be put on its base" in refuse("--base", str(tmp_path / "base"), adapter=adapter)


def test_a_base_that_is_not_there_is_named(
    refuse: Callable[..., str], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    assert f"--base {gone}: is no directory" in refuse("--base", str(gone), adapter=adapter)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refuse("--base", "no-such-model", adapter=adapter)
    assert "--base no-such-model: there is no such directory here, and the hub does not give one (" in message


@pytest.mark.parametrize("kind", ["missing", "empty", "no weights", "damaged weights", "no base"])
def test_what_is_no_whole_adapter_is_refused(
    refuse: Callable[..., str], adapter: Path, tmp_path: Path, kind: str
) -> None:
    broken = tmp_path / "run" / adapter.name
    if kind == "empty":
        broken.mkdir(parents=True)
    elif kind != "missing":
        shutil.copytree(adapter, broken)
    if kind == "no weights":
        (broken / "adapter_model.safetensors").unlink()
    elif kind == "damaged weights":
        (broken / "adapter_model.safetensors").write_bytes(b"cut off")
    elif kind == "no base":
        config = broken / "adapter_config.json"
        config.write_text(config.read_text().replace(str(adapter.parent), "/no/such"))
    expected = {
        "missing": "is no directory",
        "empty": "holds no model",
        "no weights": "No such file",
        "damaged weights": "is not as it was written (SHA-256)",
        "no base": "trained on /no/such/base, which is not there",
    }
    message = refuse(adapter=broken)
    assert str(broken) in message and expected[kind] in message


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--dtype", "int8"), "--dtype: 'int8' is none of auto, float32, bfloat16, float16"),
        (("--addapter", "x"), "addapter: there is no such key. The nearest is adapter"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused(refuse: Callable[..., str], adapter: Path, words: tuple[str, ...], names: str) -> None:
    assert names in refuse(*words, adapter=adapter)


def test_an_output_below_a_file_is_refused(refuse: Callable[..., str], adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot be written" in refuse(adapter=adapter, output=tmp_path / "file" / "merged")


def test_a_write_that_fails_halfway_is_no_model_and_can_be_repeated(
    adapter: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(model: object, base: object, directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        (directory / "left.txt").write_text("left")
        raise OSError("No space left on device")

    output = tmp_path / "merged"
    asked = ["merge", "--adapter", str(adapter), "--output", str(output)]
    with monkeypatch.context() as patched:
        patched.setattr("mft_lightning.commands.merge.save_base", full_disk)
        assert main(asked) == 1
    assert f"--output {output}: cannot be written (No space left on device)" in capsys.readouterr().err
    assert not output.exists()
    assert main(asked) == 0
    assert same_weights(output, merged) and not (output / "left.txt").exists()


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", "hpu", "mps"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(
    refuse: Callable[..., str], tmp_path: Path, device: str
) -> None:
    message = refuse("--device", device, adapter=tmp_path / "nowhere")
    assert message.startswith(f"error: --device {device}: ") and len(message) < 300


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written(
    refuse: Callable[..., str], adapter: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "run" / adapter.name
    shutil.copytree(adapter, broken)
    file, name = broken / "adapter_model.safetensors", "gpt_neox.layers.1.attention.dense"
    tensors = load_file(file)
    tensors[f"base_model.model.{name}.lora_B.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    written_again(broken)
    assert f"--adapter {broken}: merged, {name}.weight is not finite" in refuse(
        "--base", str(adapter.parent / "base"), adapter=broken
    )


def test_a_sharded_checkpoint_is_for_consolidate(refuse: Callable[..., str], adapter: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "run" / adapter.name
    shutil.copytree(adapter, sharded)
    (sharded / "shards" / "model").mkdir(parents=True)
    assert f"consolidate --checkpoint {sharded}" in refuse(adapter=sharded)


@pytest.mark.parametrize("words", ['{"max_new_', "[]", '{"max_new_tokens": -3}', '{"do_sample": false, "top_p": 0.9}'])
def test_a_generation_config_that_cannot_be_is_refused(
    refuse: Callable[..., str], adapter: Path, tmp_path: Path, words: str
) -> None:
    """Of a base too, which may have none at all."""
    base, bare = tmp_path / "base", tmp_path / "bare"
    shutil.copytree(adapter.parent / "base", base)
    shutil.copytree(adapter, bare, ignore=shutil.ignore_patterns("checkpoint.json", "generation_config.json"))
    (base / "generation_config.json").write_text(words)
    given = ("--base", str(base))
    assert f"--base {base}: its generation_config.json cannot be used (" in refuse(*given, adapter=bare)
    shutil.copy(base / "generation_config.json", bare)
    assert f"--adapter {bare}: its generation_config.json cannot be used (" in refuse(*given, adapter=bare)
    for directory in (base, bare):
        (directory / "generation_config.json").unlink()
    assert main(["merge", "--adapter", str(bare), *given, "--output", str(tmp_path / "merged")]) == 0


@pytest.mark.parametrize("words", ['{"version": "1.0", ', "{}", '{"added_tokens": [], "model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_of_a_base_is_not_left_out(
    refuse: Callable[..., str], adapter: Path, tmp_path: Path, words: str
) -> None:
    base, bare = tmp_path / "base", peft_alone(adapter, tmp_path)
    shutil.copytree(adapter.parent / "base", base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(adapter / name, base)
    (base / "tokenizer.json").write_text(words)
    assert f"--base {base}: its tokenizer cannot be loaded (" in refuse("--base", str(base), adapter=bare)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "generation_config.json"])
def test_a_checkpoints_small_files_are_as_they_were_written(
    refuse: Callable[..., str], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """But for trainer.pt, which may be gone, and adapter_config.json, which says where the base is."""
    copy = tmp_path / adapter.name
    shutil.copytree(adapter, copy)
    (copy / name).write_bytes((copy / name).read_bytes()[:-20])
    assert f"{name} is not as it was written (SHA-256)" in refuse(adapter=copy)
    assert main(["generate", "--model", str(copy), "--prompt", PROMPT]) == 1
    assert f"{name} is not as it was written (SHA-256)" in capsys.readouterr().err
    shutil.copy(adapter / name, copy)
    (copy / "trainer.pt").unlink()
    (copy / "adapter_config.json").write_text((copy / "adapter_config.json").read_text() + "\n")
    assert main(["merge", "--adapter", str(copy), "--output", str(tmp_path / "merged")]) == 0


# --- an adapter that was trained elsewhere


def peft_alone(adapter: Path, directory: Path, *, safe: bool = True) -> Path:
    """What peft writes of an adapter, now or before it knew safetensors."""
    (bare := directory / "bare").mkdir()
    shutil.copy(adapter / "adapter_config.json", bare)
    if safe:
        shutil.copy(adapter / "adapter_model.safetensors", bare)
    else:
        torch.save(load_file(adapter / "adapter_model.safetensors"), bare / "adapter_model.bin")
    return bare


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_it_is_asked_with_the_tokenizer_of_its_base(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], safe: bool
) -> None:
    bare, base = peft_alone(adapter, tmp_path, safe=safe), tmp_path / "base"
    shutil.copytree(adapter.parent / "base", base, ignore=shutil.ignore_patterns("tokenizer*"))
    config = bare / "adapter_config.json"
    config.write_text(config.read_text().replace(str(adapter.parent / "base"), str(base)))
    assert main(["generate", "--model", str(bare), "--prompt", PROMPT]) == 1
    assert f"error: --model {bare}: no tokenizer in '{base}'" in capsys.readouterr().err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(adapter / name, base)
    assert answered(bare, capsys) == answered(adapter, capsys)


def test_an_adapter_from_elsewhere_is_merged_and_its_base_is_said_to_be_unchecked(
    adapter: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is what peft writes, and the tokenizer is with its base."""
    bare, base = peft_alone(adapter, tmp_path), tmp_path / "base"
    shutil.copytree(adapter.parent / "base", base)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(base)
    capsys.readouterr()
    asked = ["merge", "--adapter", str(bare), "--base", str(base), "--output", str(tmp_path / "merged")]
    assert main(asked) == 0
    assert capsys.readouterr().err == (
        f"note: {bare} does not tell its base from others; --base {base} was not checked.\n"
    )
    assert same_weights(tmp_path / "merged", merged) and not (tmp_path / "merged" / "checkpoint.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ messages }}"


def test_an_adapter_that_names_no_base_needs_one(refuse: Callable[..., str], adapter: Path, tmp_path: Path) -> None:
    nameless = tmp_path / "run" / adapter.name
    shutil.copytree(adapter, nameless)
    config = nameless / "adapter_config.json"
    for nothing in (None, ""):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": nothing}))
        assert "names no base. Give one with --base" in refuse(adapter=nameless)
    assert "--base: names no base" in refuse("--base", "", adapter=nameless)
    config.write_text("{")
    assert f"{config}: cannot be read" in refuse(adapter=nameless)


# --- --overwrite


def test_a_model_that_is_there_is_replaced_when_asked(adapter: Path, merged: Path, full: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    shutil.copytree(full, output, ignore=shutil.ignore_patterns("trainer.pt"))
    (output / "merges.txt").write_text("of another tokenizer")
    with chdir(output):
        assert main(["merge", "--adapter", str(adapter), "--output", ".", "--overwrite"]) == 0
    assert same_weights(output, merged) and {path.name for path in tmp_path.iterdir()} == {"model"}
    assert {path.name for path in output.iterdir()} == {path.name for path in merged.iterdir()}


@pytest.mark.parametrize("kind", ["file", "no model", "more than a model", "link", "link to nothing", "linked file"])
def test_what_is_no_model_is_not_replaced(
    refuse: Callable[..., str], adapter: Path, merged: Path, full: Path, tmp_path: Path, kind: str
) -> None:
    output = tmp_path / "taken"
    if kind == "file":
        output.write_text("mine")
    elif kind == "link":
        shutil.copytree(merged, tmp_path / "model")
        output.symlink_to(tmp_path / "model")
    elif kind == "link to nothing":
        output.symlink_to(tmp_path / "nowhere")
    elif kind == "linked file":
        shutil.copytree(merged, output)
        (output / "config.json").rename(tmp_path / "config.json")
        (output / "config.json").symlink_to(tmp_path / "config.json")
    elif kind == "more than a model":
        shutil.copytree(full, output)
    else:
        output.mkdir()
        (output / "letters.txt").write_text("mine")
    message = refuse("--overwrite", adapter=adapter, output=output)
    assert message.startswith(f"error: --overwrite: {output} ")
    expected = {"more than a model": "holds trainer.pt", "linked file": "holds config.json, which is a link"}
    assert expected.get(kind, "is no model directory") in message


def test_an_empty_directory_may_be_replaced(adapter: Path, merged: Path, tmp_path: Path) -> None:
    (output := tmp_path / "empty").mkdir()
    assert main(["merge", "--adapter", str(adapter), "--output", str(output), "--overwrite"]) == 0
    assert same_weights(output, merged)


def test_what_is_merged_is_not_replaced(refuse: Callable[..., str], adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapter, run / adapter.name)
    shutil.copytree(adapter.parent / "base", run / "base")
    given = ("--overwrite", "--base", str(run / "base"))
    for output in (run, run / adapter.name, run / "base", run / "base" / ".." / "base"):
        message = refuse(*given, adapter=run / adapter.name, output=output)
        assert message.startswith(f"error: --output {output}: holds what is merged (")


def test_what_is_merged_is_not_replaced_where_its_files_are_links(
    refuse: Callable[..., str], adapter: Path, tmp_path: Path
) -> None:
    for name, directory in (("base", adapter.parent / "base"), ("adapter", adapter)):
        shutil.copytree(directory, tmp_path / "store" / name)
        (tmp_path / name).mkdir()
        for file in (tmp_path / "store" / name).iterdir():
            (tmp_path / name / file.name).symlink_to(file)
    (tmp_path / "store" / "adapter" / "config.json").write_text("{}")
    given = ("--overwrite", "--base", str(tmp_path / "base"))
    for name, what in (("base", f"--base {tmp_path / 'base'}"), ("adapter", f"--adapter {tmp_path / 'adapter'}")):
        message = refuse(*given, adapter=tmp_path / "adapter", output=tmp_path / "store" / name)
        assert f"holds what is merged ({what})" in message


def test_a_second_merge_into_a_directory_is_refused(refuse: Callable[..., str], adapter: Path, tmp_path: Path) -> None:
    other = started(only_run_in(tmp_path / ".merged.merging").__enter__)
    try:
        message = refuse(adapter=adapter, output=tmp_path / "merged")
        assert "another run is at work in" in message and f"(process {other} on" in message
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    assert main(["merge", "--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_the_old_model_stays_where_the_new_one_fails(
    refuse: Callable[..., str], adapter: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(model: object, base: object, directory: Path) -> None:
        raise SafetensorError("No space left on device")

    output = tmp_path / "model"
    shutil.copytree(merged, output)
    monkeypatch.setattr("mft_lightning.commands.merge.save_base", full_disk)
    assert "cannot be written (No space left" in refuse("--overwrite", adapter=adapter, output=output)
    assert same_weights(output, merged)


# --- the digest of a base


def test_a_bases_digest_is_of_its_bits_and_not_of_the_adapter(adapter: Path) -> None:
    first, second = with_adapter(adapter), with_adapter(adapter)
    digest = base_digest(base_state(first))
    assert base_digest(base_state(second)) == digest
    with torch.no_grad():
        for name, tensor in second.named_parameters():
            if "lora_" in name:
                tensor.add_(1.0)
    assert base_digest(base_state(second)) == digest
    assert base_digest(dict(reversed(base_state(second).items()))) == digest
    assert base_digest(base_state(with_adapter(adapter, dtype=torch.bfloat16))) != digest
    with torch.no_grad():
        second.get_base_model().gpt_neox.final_layer_norm.bias[0] += 1.0
    assert base_digest(base_state(second)) != digest
