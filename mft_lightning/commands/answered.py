"""The JSONL that ``predict`` writes, and what its answers come to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mft_lightning.aside import written_aside
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.held_out import Questions
from mft_lightning.data.lines import read_lines
from mft_lightning.data.records import BadRecord, Conversation, parse_record
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
    beside = summary_file(output)
    with written_aside(output) as aside:
        with aside.open("w", encoding="utf-8") as handle:
            for question, (file, line, prompt, reference) in enumerate(_asked(questions, datamodule.chat_format)):
                given = found[question]
                about = {
                    "task": datamodule.task_names[questions.tasks[question]],
                    "split": questions.splits[question],
                    "file": str(file),
                    "line": line,
                    "prompt": prompt,
                    "answer": given["answer"],
                    "reference": reference,
                    "finish_reason": "stop" if given["finished"] else "length",
                    "exact_match": given["exact"],
                }
                handle.write(json_line(about) + "\n")
        with written_aside(beside) as summary_aside:
            summary_aside.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return beside


def summary_file(output: Path) -> Path:
    """The JSON beside the answers."""
    return output.with_name(f"{output.stem}.summary.json")


def _by_question(questions: Questions, batches: Batches) -> dict[int, Mapping[str, Any]]:
    return {
        question: answer
        for number, answers in batches.items()
        for question, answer in zip(questions.batches[number].tolist(), answers, strict=True)
    }


def _asked(questions: Questions, chat_format: ChatFormat) -> Iterator[tuple[Path, int, str, str]]:
    """The file, the line, the prompt and the reference of each question, from the data as it lies there."""
    places = ((question, *questions.where(question)) for question in range(len(questions)))
    for file, wanted in groupby(places, key=lambda place: place[1]):
        lines = read_lines(file)
        for question, _, number in wanted:
            line = next((line for line in lines if line.number == number), None)
            try:
                if line is None:
                    raise BadRecord("gone", "it is gone")
                prompt, reference = _as_asked(questions, question, parse_record(line.raw), chat_format)
            except BadRecord as error:
                raise UserError(
                    f"{file}:{number}: has changed since it was read ({error.detail}). Set it back, and the same "
                    "command, without --overwrite, writes the answers; or ask again with --overwrite."
                ) from error
            yield file, number, prompt, reference


def _as_asked(questions: Questions, question: int, found: Conversation, chat_format: ChatFormat) -> tuple[str, str]:
    """The prompt and the reference of a question, if ``found`` still has the tokens that were asked."""
    answer, held = int(questions.turns[question]), questions.held(question)
    (encoded,) = chat_format.encode([found])
    start, end = len(held.prompt), len(held.prompt) + len(held.reference)
    if (
        encoded.spans[2 * answer : 2 * answer + 2] != [start, end + 1]
        or encoded.input_ids[:end] != held.prompt + held.reference
    ):
        raise BadRecord("changed", "it is another conversation")
    last = [place for place, turn in enumerate(found.turns) if turn.role == "bot"][answer]
    return chat_format.content(found.turns[last - 1].content), chat_format.content(found.turns[last].content)


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
