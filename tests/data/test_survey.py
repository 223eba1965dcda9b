"""A survey counts what training keeps, and measures what it could keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from mft_lightning.data import survey as survey_module
from mft_lightning.data.admission import RecordPolicy
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.corpus import Corpus
from mft_lightning.data.survey import TaskSurvey, survey
from mft_lightning.data.tasks import find_tasks
from mft_lightning.data.tokenizer import load_tokenizer
from tests.data.tables import loaded


def surveyed(paths: list[str], model: Path, cache_dir: Path, **policy: Any) -> tuple[list[TaskSurvey], Corpus]:
    chat_format = ChatFormat(load_tokenizer(str(model)))
    settings = {"seq_length": 2048, "on_overlong": "drop", "on_bad_record": "skip", "max_skipped_share": 1.0}
    corpus = loaded(find_tasks(paths), (1.0, 0.0, 0.0), chat_format, RecordPolicy(**settings | policy), cache_dir)
    return [survey(corpus, task, chat_format) for task in range(len(paths))], corpus


def test_the_counts_are_those_of_training(example_tasks: list[str], tiny_model: Path, tmp_path: Path) -> None:
    found, corpus = surveyed(example_tasks, tiny_model, tmp_path, seq_length=90)
    assert [survey.report for survey in found] == corpus.reports
    assert sum(survey.report.dropped["overlong"] for survey in found) > 0
    assert sum(len(survey.lengths) for survey in found) == 1240 > len(corpus.table("train"))


@pytest.mark.parametrize("on_overlong", ["drop", "truncate"])
def test_lengths_are_those_before_anything_is_left_out_or_cut(
    example_tasks: list[str], tiny_model: Path, tmp_path: Path, on_overlong: str
) -> None:
    """Against transformers' own template and tokenizer, where the ids agree with one string."""
    found, _ = surveyed(example_tasks, tiny_model, tmp_path, seq_length=90, on_overlong=on_overlong)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for path, task in zip(example_tasks, found, strict=True):
        lengths = []
        for file in sorted(Path(path).iterdir()):
            for line in file.read_text().splitlines():
                text = ""
                for turn in json.loads(line)["chat_rounds"]:
                    text += f"<|role_start|>{turn['role']}<|role_end|>{turn['content']}"
                    text += "<|endoftext|>" if turn["role"] == "bot" else ""
                lengths.append(len(tokenizer(text)["input_ids"]))
        assert task.differing == 0 and list(task.lengths) == lengths
        ordered = sorted(lengths)
        places = [int(np.ceil((len(ordered) - 1) * share)) for share in (0.5, 0.9, 0.99, 1.0)]
        assert task.quantiles() == [ordered[place] for place in places]


def test_a_task_of_nothing_but_bad_records(write_task: Callable[..., str], tiny_model: Path, tmp_path: Path) -> None:
    ((survey,), _) = surveyed([write_task("bad", ["nope", "no"])], tiny_model, tmp_path)
    assert survey.report.dropped == {"invalid-json": 2} and survey.quantiles() == [0, 0, 0, 0] and not survey.differing


def test_what_one_string_would_encode_otherwise(
    write_task: Callable[..., str], pythia: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full stop after a marker merges with it, over more conversations than are compared at once."""
    plain, merging = {"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": ".b"}
    task = write_task("some", [plain] * 500 + [merging] * 7)
    ((survey,), _) = surveyed([task], pythia, tmp_path)
    assert (survey.compared, survey.differing) == (507, 7)
    monkeypatch.setattr(survey_module, "COMPARED", 502)
    ((survey,), _) = surveyed([task], pythia, tmp_path)
    assert (survey.compared, survey.differing) == (502, 2)
    markers = "<|role_start|>human<|role_end|>a<|role_start|>bot<|role_end|>"
    tokenizer = AutoTokenizer.from_pretrained(pythia)
    whole = tokenizer(markers + ".b<|endoftext|>")["input_ids"]
    assert whole != tokenizer(markers)["input_ids"] + tokenizer(".b<|endoftext|>")["input_ids"]
