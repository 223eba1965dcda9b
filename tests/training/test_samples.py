"""Samples: which are asked, what is shown of them, and that the model's own greedy answers are what is shown."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from mft_lightning.cli import main
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.held_out import Held
from mft_lightning.model.generation import Answer, answer_on_ranks
from mft_lightning.training import asking
from mft_lightning.training.asking import _batches
from mft_lightning.training.questions import questions
from mft_lightning.training.samples import COLUMNS, MOST_OF_PROMPT, MOST_TOKENS, Sample, panels, wrapped
from tests.conftest import ROOT
from tests.integration.layouts import in_series
from tests.training.test_markdown import code, shown

TASKS = ("text_to_code", "code_explanation", "unit_tests")


@pytest.fixture(scope="module")
def data(example_tasks: list[str]) -> MFTDataModule:
    return MFTDataModule(data_paths=example_tasks, tokenizer_path=str(ROOT / "examples" / "model"))


@pytest.fixture
def arguments(tiny_model: Path, example_tasks: list[str]) -> Callable[..., list[str]]:
    def of(output_dir: Path, *words: str, **keys: str) -> list[str]:
        given = {
            "config": str(ROOT / "configs" / "full.yaml"),
            "output_dir": str(output_dir),
            "data.data_paths": f"[{','.join(example_tasks)}]",
            "data.num_workers": "0",
            "data.total_train_batch_size": "8",
            "model.pretrained_model_path": str(tiny_model),
            "model.learning_rate": "1e-2",
            "trainer.max_epochs": "null",
            "trainer.max_steps": "4",
            "evaluation.steps": "2",
            "evaluation.max_conversations_per_task": "4",
            "evaluation.samples_per_task": "2",
            "checkpoint.checkpointing_steps": "2",
            "checkpoint.save_total_limit": "null",
        }
        return [*(f"--{key}={value}" for key, value in given.items()), *words]

    return of


def texts(run: Path) -> dict[str, dict[int, str]]:
    """Of each tag, what TensorBoard's reader has at each step."""
    events = EventAccumulator(str(run / "runs"), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)}
        for tag in events.Tags()["tensors"]
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "text"
    }


# --- which


def test_samples_are_the_last_answers_and_the_same_every_time(data: MFTDataModule) -> None:
    asked = questions(data, "valid", 0, 2)
    assert [question.shown for question in asked] == [True] * 6 and not any(question.counts for question in asked)
    assert asked == questions(data, "valid", 0, 2)
    both = questions(data, "valid", 3, 2)
    assert {q.where for q in both if q.shown} == {q.where for q in asked}
    longer = [q for q in both if q.held.task == 1 and q.counts]  # of two answers each
    assert len(longer) == 6 and sum(q.shown for q in longer) == 2
    for question in (q for q in longer if q.shown):
        first = [q for q in longer if q.where == question.where and not q.shown]
        assert len(first) == 1 and len(first[0].held.prompt) < len(question.held.prompt)


def test_batches_hold_all_and_no_more_tokens_than_they_may() -> None:
    held = [Held(0, [1] * length, [1]) for length in (3, 90, 20, 20, 5, 5, 5, 200)]
    order = sorted(range(len(held)), key=lambda number: len(held[number].prompt))
    batches = _batches(order, held, 10, 100)
    assert sorted(number for batch in batches for number in batch) == list(range(len(held)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (max(len(held[number].prompt) for number in batch) + 10) <= 100


# --- how they look


def test_a_panel_shows_code_as_it_is_and_says_what_is_left_out(data: MFTDataModule) -> None:
    encode = data.tokenizer.encode
    reference = "```python\ndef f(x):\n    return x  # *not* _markup_\n```"
    long = "words and more words " * 300
    samples = [
        Sample(Held(0, encode("write\n````\nf"), encode(reference)), "a_b.jsonl:3", Answer(encode(reference), True)),
        Sample(Held(0, encode(long), encode(long)), "a_b.jsonl:4", Answer(encode(long)[:MOST_TOKENS], False)),
        Sample(Held(2, [1], [2]), "c.jsonl:1", Answer([], True)),
    ]
    found = panels(data.chat_format, samples)
    assert list(found) == [0, 2]
    page = shown(found[0])
    blocks = code(page)
    assert blocks[:3] == ["write\n````\nf\n", f"{reference}\n", f"{reference}\n"] and len(blocks) == 6
    assert "<h4>1. the reference to the letter</h4>" in page
    assert f"<h4>2. not ended after {MOST_TOKENS} tokens</h4>" in page
    left = len(encode(long)) - MOST_OF_PROMPT
    assert f"without its first {left:,} tokens" in page and "a_b.jsonl:4" in html.unescape(page)
    assert "not the reference" in found[2] and "(empty)" in shown(found[2])


def test_long_lines_go_on_with_an_arrow_and_lose_nothing() -> None:
    for text in ("short\n\n  indented", "word " * 100, "x" * 500, "a" * COLUMNS, ""):
        lines = wrapped(text).split("\n")
        assert all(len(line) <= COLUMNS for line in lines)
        assert wrapped(text).replace("\n\N{RIGHTWARDS ARROW WITH HOOK} ", "") == text


# --- in runs


def test_every_validation_has_the_checkpoint_s_own_answers(
    arguments: Callable[..., list[str]], data: MFTDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[int] = []

    def counted(network: Any, tokenizer: Any, batch: Sequence[Sequence[int]], settings: Any) -> list[Answer]:
        prompts.append(len(batch))
        return answer_on_ranks(network, tokenizer, batch, settings)

    monkeypatch.setattr(asking, "answer_on_ranks", counted)
    assert main(["fit", *arguments(tmp_path / "run", "--evaluation.exact_match_per_task=3")]) == 0
    at_end = len(questions(data, "valid", 3, 0))  # those that are shown are among those that count
    assert sum(prompts) == 6 + 6 + at_end
    found = texts(tmp_path / "run")
    assert found.keys() == {"run/config", "run/data", *(f"answers/{task}" for task in TASKS)}
    assert all(list(found[f"answers/{task}"]) == [0, 2, 4] for task in TASKS)
    for step in (2, 4):
        checkpoint = tmp_path / "run" / f"step-0000000{step}"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
        page = code(shown(found["answers/unit_tests"][step]))
        asked = [question.held for question in questions(data, "valid", 0, 2) if question.held.task == 2]
        for number, held in enumerate(asked):
            assert page[3 * number + 1] == f"{wrapped(tokenizer.decode(held.reference))}\n"
            ids = torch.tensor([held.prompt])
            with torch.no_grad():
                given = model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
            assert page[3 * number + 2].startswith(tokenizer.decode(given[0, len(held.prompt) :])[:10])


def test_two_ranks_write_what_one_process_writes(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    words = ("--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.precision=64-true")
    assert main(["fit", *arguments(tmp_path / "one", *words, "--trainer.devices=1")]) == 0
    words = (*words, "--trainer.devices=2")
    lines = [["fit", *arguments(tmp_path / how, *words, f"--trainer.strategy={how}")] for how in ("ddp", "fsdp")]
    in_series(2, lines, tmp_path)
    ours = texts(tmp_path / "one")
    for how in ("ddp", "fsdp"):
        theirs = texts(tmp_path / how)
        assert {tag for tag in ours if ours[tag] != theirs[tag]} == {"run/config", "run/data"}, (
            how
        )  # which tell of the devices
        assert len(list((tmp_path / how / "runs").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--evaluation.strategy=none",), "evaluation.samples_per_task: needs validations"),
        (("--data.tokenize_mode=pretrain",), "evaluation.samples_per_task: data.tokenize_mode pretrain has no"),
    ],
)
def test_samples_are_refused_where_there_are_none(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    assert main(["fit", *arguments(tmp_path / "run", *words)]) == 1
    assert message in capsys.readouterr().err


def test_a_run_without_tensorboard_asks_nothing_and_says_so(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *arguments(tmp_path / "run", "--trainer.logger=false")]) == 0
    assert "note: evaluation.samples_per_task: trainer.logger: false shows no samples" in capsys.readouterr().out
    assert not (tmp_path / "run" / "runs").exists()
