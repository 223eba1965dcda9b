"""Role markers that are tokens, and the rows that learn them, from a run to a model that a stranger asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mft_lightning.cli import main
from mft_lightning.training.checkpoint_dirs import read_metadata, write_metadata
from tests.integration.conftest import metrics, same_weights, weights
from tests.integration.layouts import apart, differ, in_series

ADDED = ("--data.role_tokens", "added")
LAST, HALF = "step-00000008", "step-00000004"
PROMPT = "Write a test for this function:\n\ndef check_size(size):\n    return size != 7"
NEW = slice(512, 515)
COPIES = ("base_model.model.gpt_neox.embed_in.weight", "base_model.model.lm_head.weight")


@pytest.fixture(scope="module")
def drawn(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on a random base, with dropout, every save kept."""
    words = (*ADDED, "--checkpoint.save_total_limit", "null")
    return fit(tmp_path_factory.mktemp("drawn"), *words, config="lora.yaml")


@pytest.fixture(scope="module")
def base(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model that knows markers as text and has no rows to spare."""
    return fit(tmp_path_factory.mktemp("full"), "--evaluation.strategy", "none") / LAST


@pytest.fixture(scope="module")
def pretrained(base: Path) -> tuple[str, ...]:
    return ("--model.pretrained_model_path", str(base), "--model.init", "pretrained")


@pytest.fixture(scope="module")
def grown(fit: Callable[..., Path], pretrained: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on that model."""
    words = (*ADDED, *pretrained, "--evaluation.exact_match_per_task", "1")
    return fit(tmp_path_factory.mktemp("grown"), *words, config="lora.yaml")


def by_a_stranger(model: Any, directory: Path) -> str:
    """transformers' own way: the saved template, the saved tokenizer, a greedy answer without special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    turns = [{"role": "user", "content": PROMPT}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert asked["input_ids"][0, 0] == 513 and asked["input_ids"][0, -1] == 514
    found = model.eval().generate(**asked, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(found[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def answered(directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["generate", "--model", str(directory), "--prompt", PROMPT, "--max_new_tokens", "16"]) == 0
    return capsys.readouterr().out.removesuffix("\n")


def test_a_random_base_and_its_adapter_open_as_they_lie(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(drawn / "base")
    assert model.config.vocab_size == 515
    drawn_rows = model.get_output_embeddings().weight[NEW].clone()
    adapted = PeftModel.from_pretrained(model, str(drawn / LAST))
    trained = adapted.get_output_embeddings().weight[NEW]  # type: ignore[operator]
    assert (trained - drawn_rows).abs().amax(1).min() > 1e-3  # every new row learned
    assert by_a_stranger(adapted, drawn / LAST) == answered(drawn / LAST, capsys) != ""


def test_it_goes_on_to_the_bit(fit: Callable[..., Path], drawn: Path, tmp_path: Path) -> None:
    part = fit(tmp_path / "part", *ADDED, "--ckpt_path", str(drawn / HALF), config="lora.yaml")
    assert same_weights(part / LAST, drawn / LAST)
    assert metrics(part) == [row for row in metrics(drawn) if int(row["step"]) > 4]
    ours, theirs = (torch.load(run / LAST / "trainer.pt", weights_only=True) for run in (part, drawn))
    assert str(ours["optimizer_states"]) == str(theirs["optimizer_states"])


def test_an_adapter_holds_its_copies_once_and_nothing_else_of_the_base(drawn: Path) -> None:
    held = weights(drawn / LAST)
    assert [name for name in held if "lora_" not in name] == list(COPIES)
    assert {tuple(held[name].shape) for name in COPIES} == {(515, 32)}


def test_other_role_tokens_are_another_run(drawn: Path, refused: Callable[..., str]) -> None:
    for command in ("fit", "validate"):
        message = refused(drawn, "--ckpt_path", "last", config="lora.yaml", command=command)
        assert "belongs to another run: data.role_tokens was 'added', is 'text'" in message


def test_a_checkpoint_from_before_the_key_knows_markers_as_text(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    run = fit(tmp_path / "run", "--evaluation.strategy", "none", "--trainer.max_steps", "1")
    checkpoint = run / "step-00000001"
    metadata = read_metadata(checkpoint)
    assert metadata["fingerprint"].pop("data.role_tokens") == "text"
    write_metadata(checkpoint, metadata)
    words = ("--evaluation.strategy", "none", "--trainer.max_steps", "2", "--ckpt_path", "last")
    assert "data.role_tokens was 'text', is 'added'" in refused(run, *words, *ADDED)
    assert (fit(run, *words) / "step-00000002").is_dir()


def test_embeddings_that_grew_open_on_a_base_that_has_as_many_rows(
    grown: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/training.md has these lines for peft alone; the commands here need none of them."""
    assert any(name.startswith("val/exact_match/") and share for name, share in metrics(grown)[-1].items())
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(grown / LAST)))
    adapted: Any = PeftModel.from_pretrained(model, str(grown / LAST))
    ids = torch.arange(455, 515)[None]
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits
    answer = by_a_stranger(adapted, grown / LAST)
    assert answer == answered(grown / LAST, capsys) != ""

    merged = grown / "merged"
    assert main(["merge", "--adapter", str(grown / LAST), "--output", str(merged)]) == 0
    theirs = adapted.merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert ours.config.vocab_size == 515
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert by_a_stranger(ours, merged) == answered(merged, capsys) == answer


def test_another_base_is_still_told(grown: Path, drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(grown / "wrong")
    assert main(["merge", "--adapter", str(grown / LAST), "--output", output, "--base", str(drawn / "base")]) == 1
    assert "is not the base that step-00000008 was trained on" in capsys.readouterr().err


def test_a_run_from_a_model_that_has_them_adds_none(
    fit: Callable[..., Path],
    refused: Callable[..., str],
    drawn: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    merged = tmp_path / "merged"
    assert main(["merge", "--adapter", str(drawn / LAST), "--output", str(merged)]) == 0
    words = ("--model.pretrained_model_path", str(merged), "--model.init", "pretrained")
    assert "has the role markers as tokens" in refused(tmp_path / "text", *words)
    capsys.readouterr()
    run = fit(tmp_path / "next", *words, *ADDED, "--trainer.max_steps", "1", config="lora.yaml")
    assert "whole  " not in capsys.readouterr().out
    assert not [name for name in weights(run / "step-00000001") if "lora_" not in name]
    first, again = (AutoTokenizer.from_pretrained(path) for path in (merged, run / "step-00000001"))
    assert first.get_vocab() == again.get_vocab() and len(first) == 515


def test_all_weights_learn_them_too(
    fit: Callable[..., Path], pretrained: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path / "run", *ADDED, *pretrained, "--model.pad_vocab_to_multiple_of", "64")
    model = AutoModelForCausalLM.from_pretrained(run / LAST)
    assert model.config.vocab_size == 576
    assert by_a_stranger(model, run / LAST) == answered(run / LAST, capsys) != ""


def test_rows_that_are_there_stay_where_nothing_trains_whole(
    fit: Callable[..., Path], tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model with rows to spare, as Pythia's 50,304 for 50,277 tokens."""
    spare = tmp_path / "spare"
    spare.mkdir()
    for file in tiny_model.iterdir():
        (spare / file.name).write_text(file.read_text().replace('"vocab_size": 512', '"vocab_size": 520'))
    words = (*ADDED, "--model.pretrained_model_path", str(spare), "--trainer.max_steps", "1")
    run = fit(tmp_path / "run", *words, "--model.lora.modules_to_save", "[]", config="lora.yaml")
    said = capsys.readouterr().out
    assert "note" in said and "has never seen 3 of its tokens, and their rows do not all train" in said
    assert not [name for name in weights(run / "step-00000001") if "lora_" not in name]
    run = fit(tmp_path / "learned", *words, config="lora.yaml")
    assert "whole       embed_in, lm_head (for new tokens)\n" in capsys.readouterr().out
    assert weights(run / "step-00000001")[COPIES[0]].shape == (520, 32)


@pytest.fixture(scope="module")
def exact(pretrained: tuple[str, ...]) -> tuple[str, ...]:
    """A run whose sums are the same in every order, to rounding of float64."""
    words = (*ADDED, *pretrained, "--trainer.precision", "64-true", "--model.lora.dropout", "0")
    return (*words, "--data.per_device_train_batch_size", "4", "--trainer.max_steps", "2", "--evaluation.steps", "2")


@pytest.fixture(scope="module")
def one(fit: Callable[..., Path], exact: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("one"), *exact, config="lora.yaml")


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tensor"])
def test_several_devices_take_the_steps_of_one(
    fit_arguments: Callable[..., list[str]],
    exact: tuple[str, ...],
    pretrained: tuple[str, ...],
    one: Path,
    tmp_path: Path,
    layout: str,
) -> None:
    """From a stored base whose rows grow; sharded and with dropout, a resumed run ends with the same bits."""
    dropping = (*ADDED, *pretrained, "--evaluation.strategy", "none", "--checkpoint.checkpointing_steps", "1")
    dropping += ("--trainer.max_steps", "2", "--checkpoint.save_total_limit", "null")
    runs = {"several": exact}
    if layout == "fsdp":
        half = ("--ckpt_path", str(tmp_path / "dropping" / "step-00000001"))
        runs |= {"dropping": dropping, "resumed": (*dropping, *half)}
    strategy = ("--trainer.strategy", "ddp" if layout == "ddp" else "fsdp")
    if layout == "tensor":
        strategy += ("--parallel.tensor_parallel_size", "2")
    lines = [
        ["fit", *fit_arguments(tmp_path / name, *words, *strategy, config="lora.yaml")] for name, words in runs.items()
    ]
    in_series(2, lines, tmp_path)
    last = "step-00000002"
    assert differ(metrics(one), metrics(tmp_path / "several")) < 1e-9
    assert apart(weights(one / last), weights(tmp_path / "several" / last)) < 1e-9
    if layout == "fsdp":
        assert same_weights(tmp_path / "dropping" / last, tmp_path / "resumed" / last)
