"""A survey counts what training keeps, and measures what it could keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.records import parse_record
from mft_lightning.data.survey import Survey, TaskSurvey
from mft_lightning.data.tasks import find_tasks
from mft_lightning.data.token_cache import RecordPolicy, build_tables, encode_records, task_lines
from mft_lightning.data.tokenizer import load_tokenizer


def surveyed(paths: list[str], model: Path, **policy: object) -> tuple[list[TaskSurvey], RecordPolicy]:
    chat_format = ChatFormat(load_tokenizer(str(model)))
    settings = {"seq_length": 2048, "on_overlong": "drop", "on_bad_record": "skip", "max_skipped_share": 1.0}
    made = RecordPolicy(**settings | policy)
    tasks = find_tasks(paths)
    survey = Survey([task.name for task in tasks], chat_format)
    for task in tasks:
        for record in encode_records(task_lines(task), chat_format, made):
            survey.add(task.name, "train", record)
    return survey.finish(), made


def test_the_counts_are_those_of_training(example_tasks: list[str], tiny_model: Path) -> None:
    found, policy = surveyed(example_tasks, tiny_model, seq_length=90)
    chat_format = ChatFormat(load_tokenizer(str(tiny_model)))
    tables, reports = build_tables(find_tasks(example_tasks), (1.0, 0.0, 0.0), chat_format, policy, 42)
    assert [survey.report for survey in found] == reports
    assert sum(report.dropped["overlong"] for report in reports) > 0
    assert sum(len(survey.lengths) for survey in found) == 1240 > len(tables["train"])


@pytest.mark.parametrize("on_overlong", ["drop", "truncate"])
def test_lengths_are_those_before_anything_is_left_out_or_cut(
    example_tasks: list[str], tiny_model: Path, on_overlong: str
) -> None:
    """Against transformers' own template and tokenizer, where the ids agree with one string."""
    found, _ = surveyed(example_tasks, tiny_model, seq_length=90, on_overlong=on_overlong)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for path, survey in zip(example_tasks, found, strict=True):
        lengths = []
        for file in sorted(Path(path).iterdir()):
            for line in file.read_text().splitlines():
                text = ""
                for turn in json.loads(line)["chat_rounds"]:
                    text += f"<|role_start|>{turn['role']}<|role_end|>{turn['content']}"
                    text += "<|endoftext|>" if turn["role"] == "bot" else ""
                lengths.append(len(tokenizer(text)["input_ids"]))
        assert survey.differing == 0 and list(survey.lengths) == lengths
        ordered = sorted(lengths)
        places = [int(np.ceil((len(ordered) - 1) * share)) for share in (0.5, 0.9, 0.99, 1.0)]
        assert survey.quantiles() == [ordered[place] for place in places]


def test_a_task_of_nothing_but_bad_records(write_task: Callable[..., str], tiny_model: Path) -> None:
    ((survey,), _) = surveyed([write_task("bad", ["nope", "no"])], tiny_model)
    assert survey.report.dropped == {"invalid-json": 2} and survey.quantiles() == [0, 0, 0, 0] and not survey.differing


def test_what_one_string_would_encode_otherwise(write_task: Callable[..., str], pythia: Path) -> None:
    """A full stop after a marker merges with it, over more conversations than are compared at once."""
    plain, merging = {"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": ".b"}
    ((survey,), _) = surveyed([write_task("some", [plain] * 1500 + [merging] * 7)], pythia)
    chat_format = ChatFormat(load_tokenizer(str(pythia)))
    assert survey.differing == 7
    assert chat_format.encodes_as_one_string([parse_record(json.dumps(merging).encode())]) == [False]
