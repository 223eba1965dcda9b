"""``inspect``: what the model will see and learn from, record by record, with the keys of ``fit``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import groupby, islice
from typing import Any

import numpy as np
from rich.text import Text

from mft_lightning.commands.report import first_left_out, left_out
from mft_lightning.data.chat_format import ROLE_END, ROLE_START, ChatFormat, Encoded, marker
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.survey import Survey, TaskSurvey
from mft_lightning.data.tasks import SPLITS, Task
from mft_lightning.data.token_cache import Record, encode_records, refuse, split_codes, task_lines
from mft_lightning.errors import UserError
from mft_lightning.quiet import quieten
from mft_lightning.run_config import RunConfig
from mft_lightning.screen import Grid, console, json_line, printable, reader_may_leave, say

SUPERVISED, MARKER = "black on green", "cyan"
DEFAULT_SHOWN = 3  # conversations of each task and split, without --limit and --json
EXTRA: dict[str, dict[str, Any]] = {
    "json": {"action": "store_true", "help": "One JSON object for every record of every split."},
    "limit": {"type": int | None, "default": None, "help": "At most so many records."},
}


def inspect(argv: list[str]) -> None:
    """Print every record (``--json``), or a table of the tasks and some conversations.

    With ``--json`` all records are printed, bad ones too; a bad record that ``fit`` would stop at still ends the
    command with that error, after the list.
    """
    quieten()
    config = RunConfig(argv, "inspect", EXTRA)
    limit = config.config["limit"]
    if limit is not None and limit < 0:
        raise UserError(f"--limit: {limit} is negative.")
    datamodule = config.datamodule
    with reader_may_leave():
        if config.config["json"]:
            _print_json(datamodule, limit)
        else:
            _print_survey(datamodule, limit)


def records(datamodule: MFTDataModule) -> Iterator[tuple[str, str, Record]]:
    """(split, task name, record) of every line: by split, task, file and line."""
    for number, split in enumerate(SPLITS):
        for task, codes in _coded_tasks(datamodule):
            lines = (line for line, code in zip(task_lines(task), codes, strict=True) if code == number)
            for record in encode_records(lines, datamodule.chat_format, datamodule.policy):
                yield split, task.name, record


def _coded_tasks(datamodule: MFTDataModule) -> Iterator[tuple[Task, np.ndarray]]:
    for tasks, shares in _sources(datamodule):
        for task in tasks:
            yield task, split_codes(task, shares, datamodule.seed)


def _sources(datamodule: MFTDataModule) -> list[tuple[list[Task], tuple[float, float, float]]]:
    """The task directories and the validation directories, with the shares of their splits."""
    return [(datamodule.tasks, datamodule.shares), (datamodule.valid_tasks, (0.0, 1.0, 0.0))]


def as_object(datamodule: MFTDataModule, split: str, task: str, record: Record) -> dict[str, Any]:
    """The JSON object of a record; ``reason`` and ``detail`` are there only if it is dropped."""
    text = datamodule.chat_format.render(record.conversation) if record.conversation else None
    if record.truncated and record.encoded:
        text = datamodule.chat_format.decode(record.encoded.input_ids)
    found: dict[str, Any] = {
        "task": task,
        "split": split,
        "file": str(record.line.file),
        "line": record.line.number,
        "input_ids": record.encoded.input_ids if record.encoded else [],
        "supervised": record.encoded.supervised if record.encoded else [],
        "text": text,
    }
    if record.truncated:
        found["truncated"] = True
    if record.reason is not None:
        found |= {"reason": record.reason, "detail": record.detail}
    return found


def _print_json(datamodule: MFTDataModule, limit: int | None) -> None:
    refused: UserError | None = None
    for split, task, record in islice(records(datamodule), limit):
        print(json_line(as_object(datamodule, split, task, record)))
        try:
            refuse(record, datamodule.policy)
        except UserError as error:
            refused = refused or error
    sys.stdout.flush()
    if refused is not None:
        raise refused


def _print_survey(datamodule: MFTDataModule, limit: int | None) -> None:
    """A table of the tasks, then conversations; an error that ``fit`` would end with comes last."""
    kept: dict[tuple[str, str], list[Record]] = {(s, t): [] for s in SPLITS for t in datamodule.task_names}
    for title, (tasks, shares) in zip((None, "validation directories"), _sources(datamodule), strict=True):
        survey = Survey([task.name for task in tasks], datamodule.chat_format)
        for task in tasks:  # in the order in which `fit` reads
            codes = split_codes(task, shares, datamodule.seed)
            encoded = encode_records(task_lines(task), datamodule.chat_format, datamodule.policy)
            for code, record in zip(codes, encoded, strict=True):
                survey.add(task.name, SPLITS[code], record)
                found = kept[SPLITS[code], task.name]
                if record.reason is None and len(found) < (DEFAULT_SHOWN if limit is None else limit):
                    found.append(record)
        say(*(["", title] if title and tasks else []))
        _say_table(survey.finish())
    say("", "length: tokens of a conversation, those included that are left out or cut as too long")
    say("one string: conversations that would be encoded otherwise if the whole text were tokenised at once")
    screen = console()
    colour = screen.color_system is not None and not screen.no_color
    chosen = [(split, name, record) for (split, name), found in kept.items() for record in found][:limit]
    if chosen:
        say("", _legend(colour))
    for split, name, record in chosen:
        assert record.encoded is not None
        where = printable(record.where)
        say("", Text(f"--- {name}, {split}, {where}, {len(record.encoded.input_ids)} tokens", style="bold"))
        say(highlighted(datamodule.chat_format, record.encoded, colour=colour))
    datamodule.setup()


def _say_table(surveys: list[TaskSurvey]) -> None:
    if not surveys:
        return
    columns = ("task", "conversations", "tokens", "supervised", "share", "length median", "p90", "p99", "max")
    rows = []
    for found in surveys:
        report = found.report
        numbers = [sum(report.conversations.values()), report.tokens, report.supervised_tokens]
        share = f"{report.supervised_tokens / max(1, report.tokens):.1%}"
        lengths = [f"{quantile:,}" for quantile in found.quantiles()]
        counts = [f"{number:,}" for number in numbers]
        rows.append([report.task, *counts, share, *lengths, f"{found.differing:,}", left_out(report)])
    say(Grid([*columns, "one string", "left out"], rows, left=("left out",)))
    say(*first_left_out([found.report for found in surveys]))


def _legend(colour: bool) -> Text:
    if colour:
        return Text.assemble(
            "learned from: ", ("answers and their end", SUPERVISED), "; seen: the rest, ", _marker("role")
        )
    return Text("supervised text stands in [[double brackets]]")


def highlighted(chat_format: ChatFormat, encoded: Encoded, *, colour: bool) -> Text:
    """What is trained on, as text, with the supervised stretches in colour, or in brackets where there is none."""
    text = Text()
    tokens = zip(encoded.input_ids, encoded.supervised, strict=True)
    for supervised, run in groupby(tokens, key=lambda token: token[1]):
        stretch = printable(chat_format.decode([i for i, _ in run]))
        if not colour:
            text.append(f"[[{stretch}]]" if supervised else stretch)
        elif supervised:
            text.append(stretch, style=SUPERVISED)
        else:
            text.append_text(_with_markers(stretch))
    return text


def _with_markers(stretch: str) -> Text:
    text = Text(stretch)
    text.highlight_regex(rf"{re.escape(ROLE_START)}\w+{re.escape(ROLE_END)}", MARKER)
    return text


def _marker(role: str) -> tuple[str, str]:
    return marker(role), MARKER
