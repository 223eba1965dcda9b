"""The JSONL that ``predict`` writes, and what its answers come to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mft_lightning.aside import written_aside
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.held_out import Questions
from mft_lightning.data.lines import read_lines
from mft_lightning.data.records import BadRecord, Turn, parse_record
from mft_lightning.errors import UserError
from mft_lightning.screen import Grid, json_line

Batches = Mapping[int, Sequence[Mapping[str, Any]]]  # answers by the number of their batch


def write_answers(output: Path, datamodule: MFTDataModule, batches: Batches, said: Mapping[str, Any]) -> Path:
    """Write the answers, each beside what was asked, in the order of the data, and what they come to in a JSON beside.

    Returns:
        The JSON.

    Raises:
        UserError: a data file is no longer as it was. Nothing is written.
    """
    questions = datamodule.questions
    found = _by_question(questions, batches)
    beside = output.with_name(f"{output.stem}.summary.json")
    with written_aside(output) as aside:
        with aside.open("w", encoding="utf-8") as handle:
            for question, (file, line, turns) in enumerate(_asked(questions)):
                last = [place for place, turn in enumerate(turns) if turn.role == "bot"][questions.turns[question]]
                given = found[question]
                about = {
                    "task": datamodule.task_names[questions.tasks[question]],
                    "split": questions.splits[question],
                    "file": str(file),
                    "line": line,
                    "prompt": turns[last - 1].content,
                    "answer": given["answer"],
                    "reference": turns[last].content,
                    "finish_reason": "stop" if given["finished"] else "length",
                    "exact_match": given["exact"],
                }
                handle.write(json_line(about) + "\n")
        with written_aside(beside) as summary_aside:
            summary_aside.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return beside


def _by_question(questions: Questions, batches: Batches) -> dict[int, Mapping[str, Any]]:
    return {
        question: answer
        for number, answers in batches.items()
        for question, answer in zip(questions.batches[number].tolist(), answers, strict=True)
    }


def _asked(questions: Questions) -> Iterator[tuple[Path, int, tuple[Turn, ...]]]:
    """The file, the line and the turns of each question, from the data as it lies there."""
    places = (questions.where(question) for question in range(len(questions)))
    for file, wanted in groupby(places, key=lambda place: place[0]):
        lines = read_lines(file)
        for _, number in wanted:
            line = next((line for line in lines if line.number == number), None)
            try:
                if line is None:
                    raise BadRecord("gone", "is gone")
                turns = parse_record(line.raw).turns
            except BadRecord as error:
                raise UserError(f"{file}:{number}: has changed since it was read ({error.detail}).") from error
            yield file, number, turns


def summary(questions: Questions, batches: Batches, names: Sequence[str]) -> dict[str, Any]:
    """Of each task that was asked, by name: conversations, exact answers and their share, and answers that were cut."""
    found = _by_question(questions, batches)
    tasks: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(names):
        given = [found[question] for question in (questions.tasks == number).nonzero()[0].tolist()]
        if given or questions.left_out[number]:
            exact = sum(answer["exact"] for answer in given)
            tasks[name] = {
                "conversations": len(given),
                "exact_match": exact,
                "exact_match_share": exact / len(given) if given else None,
                "cut_at_a_limit": sum(not answer["finished"] for answer in given),
                "left_out": int(questions.left_out[number]),
            }
    shares = [task["exact_match_share"] for task in tasks.values() if task["conversations"]]
    return {"tasks": tasks, "mean_exact_match_share": sum(shares) / len(shares)}


def summary_table(found: Mapping[str, Any]) -> Grid:
    """The same as a table; a column of zeros is left out."""
    columns = ["task", "exact match", "share", "cut at a limit", "truncated, not asked"]
    rows = [
        [
            name,
            f"{task['exact_match']:,} of {task['conversations']:,}",
            "" if task["exact_match_share"] is None else f"{task['exact_match_share']:.1%}",
            f"{task['cut_at_a_limit']:,}",
            f"{task['left_out']:,}",
        ]
        for name, task in found["tasks"].items()
    ]
    used = [number for number in range(len(columns)) if number < 3 or any(row[number] != "0" for row in rows)]
    rows.append(["mean over tasks", "", f"{found['mean_exact_match_share']:.1%}", "", ""])
    return Grid([columns[number] for number in used], [[row[number] for number in used] for row in rows])
