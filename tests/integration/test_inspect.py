"""``inspect`` shows every record of every split as training will see it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mft_lightning.cli import main
from tests.integration import preloaded
from tests.integration.conftest import user_environment

ROOT = Path(__file__).resolve().parents[2]


def inspected(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> list[dict[str, object]]:
    capsys.readouterr()
    assert main(["inspect", "--config", str(ROOT / "configs" / "full.yaml"), "--json", *words]) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_record_of_every_split_once(
    capsys: pytest.CaptureFixture[str], example_tasks: list[str], tiny_model: Path
) -> None:
    words = ("--data.data_paths", str(example_tasks), "--model.pretrained_model_path", str(tiny_model))
    found = inspected(capsys, *words, "--data.data_split", "80,10,10")
    assert Counter(record["split"] for record in found) == {"train": 992, "valid": 124, "test": 124}
    assert len({(record["file"], record["line"]) for record in found}) == len(found) == 1240
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for record in found[::97]:
        assert record["task"] in record["file"] and "reason" not in record
        assert tokenizer.decode(record["input_ids"]) == record["text"]
        line = Path(record["file"]).read_text().splitlines()[record["line"] - 1]
        answers = [turn["content"] for turn in json.loads(line)["chat_rounds"] if turn["role"] == "bot"]
        learned = [i for i, s in zip(record["input_ids"], record["supervised"], strict=True) if s]
        assert tokenizer.decode(learned) == "".join(answer + "<|endoftext|>" for answer in answers)


def test_dropped_records_are_shown_with_the_reason_and_bad_ones_end_with_an_error(
    capsys: pytest.CaptureFixture[str], write_task: Callable[..., str]
) -> None:
    records = [
        {"prompt": "a", "answer": "b"},
        {"prompt": "a" * 3000, "answer": "b"},
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    words = ("--data.data_paths", f"[{write_task('mixed', records)}]")
    found = inspected(capsys, *words, code=1)
    assert sorted((record["line"], record.get("reason")) for record in found) == [
        (1, None),
        (2, "overlong"),
        (3, "no-bot-turn"),
    ]
    skip = ("--data.on_bad_record", "skip", "--data.max_skipped_share", "1")
    assert inspected(capsys, *words, *skip) == found
    assert len(inspected(capsys, *words, *skip, "--limit", "2")) == 2


def test_what_is_shown_as_supervised_is_what_is_learned(
    capsys: pytest.CaptureFixture[str], write_task: Callable[..., str]
) -> None:
    task = write_task("long", [{"prompt": "ask", "answer": "ab"}, {"prompt": "ask", "answer": "ab " * 40}])
    shown = ["inspect", "--config", "full.yaml", "--data.data_paths", f"[{task}]", "--data.data_split", "1,0,0"]
    assert main([*shown, "--data.on_overlong", "truncate", "--data.tokenize_mode", "pretrain"]) == 0
    assert re.search(r"\[\[[^]]*human[^]]*ask[^]]*ab[^]]*\]\]", capsys.readouterr().out)
    words = ("--data.on_overlong", "truncate", "--data.seq_length", "60", "--data.tokenize_mode", "pretrain")
    found = inspected(capsys, "--data.data_paths", f"[{task}]", *words)
    (cut,) = [record for record in found if record.get("truncated")]
    assert len(cut["input_ids"]) == 60 and len(cut["text"]) < len("ab " * 40)


def test_the_count_of_what_one_string_would_encode_otherwise(
    capsys: pytest.CaptureFixture[str], pythia: Path, write_task: Callable[..., str]
) -> None:
    """A full stop before a marker merges with it; a plain answer after a plain prompt does not."""
    rounds = [{"role": r, "content": c} for r, c in (("human", "a"), ("bot", "b"), ("human", "c"), ("bot", "d"))]
    merging = [rounds[0], {"role": "bot", "content": ".b"}]
    task = write_task("some", [{"chat_rounds": rounds}, {"chat_rounds": merging}])
    words = ["--data.data_paths", f"[{task}]", "--model.pretrained_model_path", str(pythia)]
    assert main(["inspect", "--config", "full.yaml", *words, "--limit", "0"]) == 0
    columns, row = (re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()[:2])
    assert dict(zip(columns, row, strict=False))["one string"] == "1"


def test_the_table_and_some_conversations(capsys: pytest.CaptureFixture[str], example_tasks: list[str]) -> None:
    assert main(["inspect", "--config", "full.yaml", "--data.data_paths", str(example_tasks), "--limit", "2"]) == 0
    printed = capsys.readouterr().out
    assert "unit_tests" in printed and "[[def " in printed and printed.count("--- text_to_code") == 2


def test_the_table_counts_all_and_measures_what_is_left_out(
    capsys: pytest.CaptureFixture[str], write_task: Callable[..., str], tiny_model: Path
) -> None:
    records = [{"prompt": "a" * n, "answer": "b"} for n in (1, 5, 60)]
    words = ["--data.data_paths", f"[{write_task('some', records)}]", "--data.seq_length", "40"]
    assert main(["inspect", "--config", "full.yaml", "--model.pretrained_model_path", str(tiny_model), *words]) == 0
    printed = capsys.readouterr().out
    columns, row = (re.split(r"  +", line.strip()) for line in printed.splitlines()[:2])
    found = dict(zip(columns, row, strict=True))
    shown = [int(tokens) for tokens in re.findall(r"(\d+) tokens$", printed, re.MULTILINE)]
    assert found["conversations"] == "2" and found["left out"] == "1 overlong" and len(shown) == 2
    assert int(found["tokens"]) == sum(shown) and found["supervised"] == "4"
    assert found["share"] == f"{4 / sum(shown):.1%}"
    assert int(found["max"]) > 40 and int(found["length median"]) == max(shown)
    assert "part.jsonl:3 has" in printed


def test_on_a_terminal_what_is_learned_from_is_in_colour_and_data_cannot_drive_it(
    capsys: pytest.CaptureFixture[str], write_task: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    task = write_task("some", [{"prompt": "red \x1b[31m alarm\x07", "answer": "learned"}] * 4)
    shown = ["inspect", "--config", "full.yaml", "--data.data_paths", f"[{task}]", "--data.data_split", "1,0,0"]
    assert main([*shown, "--limit", "1"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b[30;42mlearned<|endoftext|>\x1b[0m" in printed and "[[" not in printed
    assert "\x1b[36m<|role_start|>bot<|role_end|>\x1b[0m" in printed
    assert "red \\x1b[31m alarm\\x07" in printed and "\x07" not in printed
    monkeypatch.setenv("NO_COLOR", "1")
    assert main([*shown, "--limit", "1"]) == 0
    assert "[[learned<|endoftext|>]]" in capsys.readouterr().out


def test_a_bad_line_is_counted_and_ends_with_the_error_of_fit(
    capsys: pytest.CaptureFixture[str], write_task: Callable[..., str]
) -> None:
    task = write_task("mixed", [{"prompt": "a", "answer": "b"}] * 30 + ["nope", {"prompt": "x"}])
    words = ["--config", "full.yaml", "--data.data_paths", f"[{task}]"]
    assert main(["inspect", *words]) == 1
    printed = capsys.readouterr()
    assert "1 invalid-json, 1 missing-content" in printed.out and "[[b<|endoftext|>]]" in printed.out
    assert main(["fit", *words]) == 1
    assert printed.err == capsys.readouterr().err and "part.jsonl:31: is not valid JSON" in printed.err
    assert main(["inspect", *words, "--data.on_bad_record", "skip"]) == 1
    assert "max_skipped_share" in capsys.readouterr().err


def test_validation_directories_have_a_table_of_their_own(
    capsys: pytest.CaptureFixture[str], example_tasks: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    valid = shutil.copytree(example_tasks[0], tmp_path / "text_to_code")
    words = ["--data.data_paths", f"[{example_tasks[0]}]", "--data.valid_data_paths", f"[{valid}]"]
    words += ["--data.data_split", "null", "--model.pretrained_model_path", str(tiny_model), "--limit", "0"]
    assert main(["inspect", "--config", "full.yaml", *words]) == 0
    training, validation = capsys.readouterr().out.split("validation directories\n")
    assert training.split()[-2:] and "text_to_code            600  52,286" in training
    assert "text_to_code            600  52,286" in validation


def test_a_reader_that_has_enough_ends_it_in_peace(tmp_path: Path) -> None:
    words = ["-m", "mft_lightning", "inspect", "--config", "quickstart.yaml"]
    (shown, theirs), errors = os.pipe(), tmp_path / "errors"
    with os.fdopen(shown) as output, errors.open("w") as handle:
        process = preloaded.start(words, user_environment(), 0, theirs, handle.fileno())
        os.close(theirs)
        assert output.readline()
    assert preloaded.exit_code(process) == 0
    assert not errors.read_text()


def test_records_are_paged_and_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--task", "unit_tests", "--split", "valid")
    every = inspected(capsys, *chosen)
    assert {(record["task"], record["split"]) for record in every} == {("unit_tests", "valid")} and len(every) == 12
    pages = [inspected(capsys, *chosen, "--page", str(page), "--limit", "5") for page in (1, 2, 3)]
    assert [len(page) for page in pages] == [5, 5, 2] and [*chain(*pages)] == every
    assert main(["inspect", "--config", "full.yaml", *chosen, "--page", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("--- unit_tests, valid") == 2 and "page 2 of 2, 12 conversations" in printed
    assert "token balance: " in printed and "text_to_code" not in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--page", "4", "--limit", "5", "--task", "unit_tests", "--split", "valid"), "past the last page, 3"),
        (("--page", "0"), "--page: pages are numbered from 1"),
        (("--task", "sums"), "--task: 'sums' is none of text_to_code"),
        (("--split", "dev"), "--split: 'dev' is none of train, valid, test"),
        (("--plots", "x", "--json"), "--plots: is drawn with the tables"),
    ],
)
def test_a_choice_that_there_is_none_of_is_told(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert main(["inspect", "--config", "full.yaml", *words]) == 1
    assert message in capsys.readouterr().err


def test_plots_are_drawn_on_demand(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", "--config", "full.yaml", "--limit", "0", "--plots", str(tmp_path / "plots")]) == 0
    names = sorted(path.name.split(".")[0] for path in (tmp_path / "plots").iterdir())
    assert names == ["balance", "events", "lengths"] and "lengths.png" in capsys.readouterr().out
