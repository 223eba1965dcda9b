"""Exact match counts the answers whose every token is the likeliest after the true history, and no others."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mft_lightning.cli import main
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.held_out import Held
from mft_lightning.training.questions import questions
from tests.conftest import ROOT

Turns = list[tuple[str, str]]
COLOURS = ["red", "green", "blue", "black"]
STEPS = 150


def learned() -> dict[str, list[Turns]]:
    """Of two tasks, conversations of one turn and of three."""
    sums = [[("human", f"{a} + {b}?"), ("bot", str(a + b))] for a, b in ((1, 1), (2, 5), (7, 6), (30, 4))]
    colours: list[Turns] = [[("system", "Be kind."), ("human", name), ("bot", f"{name} is a hue")] for name in COLOURS]
    longer = [*sums[0], ("human", "and 1 more?"), ("bot", "3"), ("human", "sure?"), ("bot", "yes, it is 3 exactly")]
    return {"sums": [*sums, longer], "colours": colours}


def held_out() -> dict[str, list[Turns]]:
    """What was learned, and with it answers that nothing could know."""
    found = learned()
    found["sums"] += [[("human", "8 + 9?"), ("bot", "it is 17 and a half")]]
    found["sums"] += [[*found["sums"][0], ("human", "and 1 more?"), ("bot", "4"), ("human", "sure?"), ("bot", "no")]]
    found["colours"] += [[("human", "pink"), ("bot", "no")], [*found["colours"][1], ("human", "red"), ("bot", "?")]]
    return found


def write(directory: Path, tasks: dict[str, list[Turns]]) -> list[str]:
    """The task directories."""
    paths = []
    for name, conversations in tasks.items():
        path = directory / name
        path.mkdir(parents=True, exist_ok=True)
        rounds = [[{"role": role, "content": content} for role, content in turns] for turns in conversations]
        (path / "part.jsonl").write_text("".join(json.dumps({"chat_rounds": turns}) + "\n" for turns in rounds))
        paths.append(str(path))
    return paths


def spelt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def answers(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> list[tuple[list[int], list[int]]]:
    """The history and the answer of each bot turn, as the format's description says."""
    found, history, stretch = [], list[int](), ""
    for role, content in turns:
        stretch += f"<|role_start|>{role}<|role_end|>"
        if role == "bot":
            history = history + spelt(tokenizer, stretch)
            found.append((history, spelt(tokenizer, content)))
            history, stretch = [*history, *spelt(tokenizer, content), tokenizer.eos_token_id], ""
        else:
            stretch += content
    return found


def exact_by_teacher_forcing(model: Any, tokenizer: PreTrainedTokenizerBase, tasks: dict[str, list[Turns]]) -> Any:
    """Of each task, how many answers are the likeliest token by token, eos included, and how many there are."""
    counts = {}
    for name, conversations in tasks.items():
        right = of = 0
        for history, answer in (pair for turns in conversations for pair in answers(tokenizer, turns)):
            wanted = torch.tensor([*answer, tokenizer.eos_token_id])
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([history + wanted.tolist()])).logits[0]
            right += bool((logits[len(history) - 1 : -1].argmax(-1) == wanted).all())
            of += 1
        counts[name] = (right, of)
    return counts


def printed_counts(text: str) -> dict[str, tuple[int, int]]:
    rows = re.findall(r"^(sums|colours) .* (\d+) of (\d+)$", text, re.MULTILINE)
    return {name: (int(right), int(of)) for name, right, of in rows}


@pytest.fixture(scope="module")
def arguments(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The keys of a run that learns a handful of conversations by heart and is asked these and others."""
    directory = tmp_path_factory.mktemp("data")
    paths, valid = write(directory / "train", learned()), write(directory / "valid", held_out())

    def of(output_dir: Path, *words: str, config: str = "full.yaml", steps: int = STEPS) -> list[str]:
        keys = {
            "--config": str(ROOT / "configs" / config),
            "--output_dir": str(output_dir),
            "--data.data_paths": f"[{','.join(paths)}]",
            "--data.valid_data_paths": f"[{','.join(valid)}]",
            "--data.data_split": "null",
            "--data.num_workers": "0",
            "--data.total_train_batch_size": "9",
            "--data.per_device_train_batch_size": "9",
            "--model.pretrained_model_path": str(tiny_model),
            "--model.learning_rate": "1e-2",
            "--model.min_lr": "1e-3",
            "--trainer.max_epochs": "null",
            "--trainer.max_steps": str(steps),
            "--trainer.log_every_n_steps": "1",
            "--evaluation.strategy": "steps",
            "--evaluation.steps": "1000",
            "--evaluation.at_start": "false",
            "--evaluation.exact_match_per_task": "50",
            "--evaluation.samples_per_task": "0",
            "--checkpoint.checkpointing_steps": "1000",
        }
        return [*(word for pair in keys.items() for word in pair), *words]

    return of


@pytest.fixture(scope="module")
def run(arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("run")
    assert main(["fit", *arguments(output_dir)]) == 0
    return output_dir


def logged(output_dir: Path) -> dict[tuple[str, str], float]:
    """By step and name."""
    with (output_dir / "metrics.csv").open(newline="") as handle:
        cells = [(row["step"], key, value) for row in csv.DictReader(handle) for key, value in row.items()]
    return {(step, key): float(value) for step, key, value in cells if "exact_match" in key and value}


# --- what is asked


def module(tmp_path: Path, tasks: dict[str, list[Turns]], **keys: Any) -> MFTDataModule:
    """Of which all is held out: one plain conversation a task is there to train on."""
    plain: Turns = [("human", "a"), ("bot", "b")]
    train = write(tmp_path / "train", {name: [plain] for name in tasks})
    valid = write(tmp_path / "valid", tasks)
    return MFTDataModule(
        data_paths=train, valid_data_paths=valid, tokenizer_path=str(ROOT / "examples" / "model"), **keys
    )


def asked(data: MFTDataModule, per_task: int) -> list[Held]:
    return [question.held for question in questions(data, "valid", per_task, 0)]


def multiset(held: list[Held]) -> Counter[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    return Counter((h.task, tuple(h.prompt), tuple(h.reference)) for h in held)


def test_every_answer_is_asked_after_its_true_history(tmp_path: Path) -> None:
    tasks = held_out()
    data = module(tmp_path, tasks)
    expected = [
        Held(number, history, answer)
        for number, conversations in enumerate(tasks.values())
        for turns in conversations
        for history, answer in answers(data.tokenizer, turns)
    ]
    assert multiset(asked(data, 50)) == multiset(expected)
    assert len(expected) == 11 + 7


def test_so_many_conversations_of_each_task_with_all_their_answers(tmp_path: Path) -> None:
    tasks = held_out()
    data = module(tmp_path, tasks)
    held = asked(data, 2)
    whole = [
        Counter((number, tuple(history), tuple(answer)) for history, answer in answers(data.tokenizer, turns))
        for number, conversations in enumerate(tasks.values())
        for turns in conversations
    ]
    kept = [conversation for conversation in whole if conversation <= multiset(held)]
    assert sum(kept, Counter()) >= multiset(held)
    assert {h.task for h in held} == {0, 1}
    assert sum(h.prompt.count(data.tokenizer.eos_token_id) == 0 for h in held) == 4  # the first of each
    assert multiset(asked(data, 2)) == multiset(held)


def test_a_truncated_answer_is_left_out_and_those_before_it_are_not(tmp_path: Path) -> None:
    turns: Turns = [("human", "2 + 3?"), ("bot", "five"), ("human", "and 4?"), ("bot", "nine of them")]
    whole = module(tmp_path, {"sums": [turns]})
    (_, first), (history, last) = pairs = answers(whole.tokenizer, turns)
    length = len(history) + len(last) + 1
    for seq_length, left in (
        (length, 2),
        (length - 1, 1),  # all of the answer but its eos
        (length - 2, 1),
        (len(history), 1),
        (len(pairs[0][0]) + len(first) + 1, 1),
        (len(pairs[0][0]) + len(first), 0),
    ):
        data = module(tmp_path, {"sums": [turns]}, seq_length=seq_length, on_overlong="truncate")
        data.setup()
        assert data.table("valid").lengths.sum() in (seq_length, 0)
        found = [(h.prompt, h.reference) for h in asked(data, 1)]
        assert found == pairs[:left], seq_length


# --- what is counted


def test_fit_counts_what_teacher_forcing_finds(run: Path) -> None:
    checkpoint = run / f"step-{STEPS:08d}"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint).eval(),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    expected = exact_by_teacher_forcing(model, tokenizer, held_out())
    assert all(0 < right < of for right, of in expected.values())
    shares = {(str(STEPS), f"val/exact_match/{name}"): right / of for name, (right, of) in expected.items()}
    assert logged(run) == shares


def test_validate_prints_what_teacher_forcing_finds(
    run: Path, arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run / f"step-{STEPS:08d}"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint).eval(),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    expected = exact_by_teacher_forcing(model, tokenizer, held_out())
    capsys.readouterr()
    assert main(["validate", *arguments(run, "--ckpt_path", "last")]) == 0
    printed = capsys.readouterr().out
    assert "exact match" in printed and printed_counts(printed) == expected
    assert main(["validate", *arguments(run, "--ckpt_path", "last", "--data.padding_mode", "padding")]) == 0
    assert printed_counts(capsys.readouterr().out) == expected


def test_validate_prints_none_unless_asked(
    run: Path, arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    words = ("--ckpt_path", "last", "--evaluation.exact_match_per_task", "null")
    assert main(["validate", *arguments(run, *words)]) == 0
    printed = capsys.readouterr().out
    assert "sums" in printed and "exact match" not in printed and "answering" not in printed


def test_a_lora_run_counts_what_teacher_forcing_finds_once_at_its_end(
    arguments: Callable[..., list[str]], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over a base that has learned half of it; with dropout, which must be off."""
    base = run / f"step-{STEPS:08d}"
    words = ("--model.pretrained_model_path", str(base), "--model.init", "pretrained", "--model.lora.r", "4")
    words += ("--model.lora.dropout", "0.9", "--model.learning_rate", "3e-2", "--model.num_warmup_steps", "0")
    words += ("--evaluation.steps", "4", "--evaluation.at_start", "true")
    capsys.readouterr()
    assert main(["fit", *arguments(tmp_path / "run", *words, config="lora.yaml", steps=20)]) == 0
    printed = capsys.readouterr().out
    adapter = tmp_path / "run" / "step-00000020"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    expected = exact_by_teacher_forcing(model, AutoTokenizer.from_pretrained(adapter), held_out())
    assert printed_counts(printed) == expected and any(right for right, _ in expected.values())
    assert printed.count("answering") == 1


def test_a_task_that_is_not_evaluated_is_not_asked(
    run: Path, arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["validate", *arguments(run, "--ckpt_path", "last", "--evaluation.exclude_tasks", "[sums]")]) == 0
    assert printed_counts(capsys.readouterr().out).keys() == {"colours"}


def test_asking_changes_nothing_of_the_run(run: Path, arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    for name, words in (("asked", ()), ("not", ("--evaluation.exact_match_per_task", "null"))):
        assert main(["fit", *arguments(tmp_path / name, *words, steps=4)]) == 0
    ours, theirs = (tmp_path / name / "step-00000004" for name in ("asked", "not"))
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert (ours / "generation_config.json").read_bytes() == (theirs / "generation_config.json").read_bytes()


# --- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--evaluation.strategy", "none"), "evaluation.exact_match_per_task: needs validations"),
        (("--data.tokenize_mode", "pretrain"), "evaluation.exact_match_per_task: data.tokenize_mode pretrain has no"),
        (("--evaluation.exact_match_per_task", "0"), "evaluation.exact_match_per_task: 0 is less than 1"),
        (("--evaluation.exact_match_per_task", "-2"), "evaluation.exact_match_per_task: -2 is less than 1"),
        (("--evaluation.exact_match_per_task", "some"), "evaluation.exact_match_per_task"),
        (("--evaluation.samples_per_task", "-1"), "evaluation.samples_per_task: -1 is less than 0"),
    ],
    ids=str,
)
def test_exact_match_is_refused_where_there_is_nothing_to_compare(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    assert main(["fit", *arguments(tmp_path / "run", *words)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_validate_refuses_it_in_pretraining(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", *arguments(tmp_path / "run", "--data.tokenize_mode", "pretrain")]) == 1
    assert "data.tokenize_mode pretrain has no answers to compare" in capsys.readouterr().err
