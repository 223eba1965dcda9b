"""``inspect``: what the model will see and learn from, record by record, with the keys of ``fit``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
from rich.text import Text

from mft_lightning.commands.figures import require_matplotlib
from mft_lightning.commands.plots import write_plots
from mft_lightning.commands.report import left_out, notes
from mft_lightning.data.admission import ADMITTED
from mft_lightning.data.balance import token_balance
from mft_lightning.data.chat_encoder import ROLE_END, ROLE_START, Encoded, marker
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.corpus import Corpus, Record
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.splits import SPLITS
from mft_lightning.data.survey import TaskSurvey, survey
from mft_lightning.errors import UserError
from mft_lightning.paths import given_path
from mft_lightning.quiet import quieten
from mft_lightning.run_config import RunConfig
from mft_lightning.screen import Grid, console, labelled, print_json, printable, reader_may_leave, say, shown

SUPERVISED, MARKER = "black on green", "cyan"
DEFAULT_SHOWN = 3  # conversations of each task and split, without --limit and --page
PAGE = 10  # conversations of a page, without --limit
EXTRA: dict[str, dict[str, Any]] = {
    "json": {"action": "store_true", "help": "One JSON object for every record, instead of tables."},
    "limit": {"type": int | None, "default": None, "help": "At most so many records, or so many on a page."},
    "page": {"type": int | None, "default": None, "help": "This page of the records, from 1."},
    "task": {"type": str | None, "default": None, "help": "Only this task."},
    "split": {"type": str | None, "default": None, "help": "Show only records of train, valid or test."},
    "plots": {
        "type": str | None,
        "default": None,
        "help": "A directory for pictures of lengths and token balance.",
    },
}


@dataclass(frozen=True)
class Choice:
    """Which records are shown."""

    task: str | None
    split: str | None
    limit: int | None
    page: int | None

    def check(self, datamodule: MFTDataModule) -> None:
        """Raise for a name or a number that there is none of."""
        if self.limit is not None and self.limit < 0:
            raise UserError(f"--limit: {self.limit} is negative.")
        if self.page is not None and (self.page < 1 or self.limit == 0):
            raise UserError("--page: pages are numbered from 1 and hold at least one record.")
        if self.task is not None and self.task not in datamodule.task_names:
            raise UserError(f"--task: {self.task!r} is none of {', '.join(datamodule.task_names)}.")
        if self.split is not None and self.split not in SPLITS:
            raise UserError(f"--split: {self.split!r} is none of {', '.join(SPLITS)}.")

    def corpora(self, datamodule: MFTDataModule) -> list[tuple[Corpus, list[int]]]:
        """The corpora, each with the places of the tasks in it that are shown."""
        found = datamodule.load(stop=False)
        return [(c, [n for n, task in enumerate(c.tasks) if self.task in (None, task.name)]) for c in found]

    def groups(self, datamodule: MFTDataModule) -> list[tuple[Corpus, np.ndarray]]:
        """The records of each split and task, in the order of file and line."""
        corpora = self.corpora(datamodule)
        splits = [number for number, split in enumerate(SPLITS) if self.split in (None, split)]
        return [(c, c.records(task, split)) for split in splits for c, tasks in corpora for task in tasks]

    def paged(self, groups: list[tuple[Corpus, np.ndarray]]) -> Iterator[Record]:
        """The records of the page, or the first ``limit``, or all."""
        size = self.limit if self.page is None else self.limit or PAGE
        start = 0 if self.page is None or size is None else (self.page - 1) * size
        total = sum(len(numbers) for _, numbers in groups)
        if self.page is not None and start >= max(1, total):
            raise UserError(f"--page: {self.page} is past the last page, {max(1, math.ceil(total / (size or 1)))}.")
        every = ((corpus, number) for corpus, numbers in groups for number in numbers)
        for corpus, number in islice(every, start, None if size is None else start + size):
            yield corpus.record(int(number))


def inspect(argv: list[str]) -> None:
    """Print every record (``--json``), or a table of the tasks and some conversations.

    With ``--json`` bad records are printed too. What ``fit`` would stop at still ends the command with that error,
    after all else.
    """
    quieten()
    config = RunConfig(argv, "inspect", EXTRA)
    with config.placing():
        _inspect(config)


def _inspect(config: RunConfig) -> None:
    choice = Choice(**{name: config.config[name] for name in ("task", "split", "limit", "page")})
    datamodule = config.datamodule
    choice.check(datamodule)
    config.model.check(datamodule, data_alone=True)
    plots = given_path(config.config["plots"], "--plots") if config.config["plots"] else None
    if plots is not None:
        if config.config["json"]:
            raise UserError("--plots: is drawn with the tables. Leave --json out.")
        require_matplotlib()
    with reader_may_leave():
        if config.config["json"]:
            for record in choice.paged(choice.groups(datamodule)):
                print_json(as_object(datamodule.chat_format, record))
            for corpus in datamodule.load():
                corpus.refuse()
        else:
            surveys = _print_tables(datamodule, choice)
            _print_conversations(datamodule, choice)
            datamodule.setup()
            balance = token_balance(datamodule.plan, datamodule.devices)
            say("", balance.summary())
            if plots is not None:
                lengths = {found.report.task: found.lengths for found in surveys}
                seq_length = datamodule.policy.seq_length
                files = write_plots(plots, lengths=lengths, seq_length=seq_length, balance=balance)
                say(*labelled([("plots", f"{', '.join(shown(file) for file in files)}")]))


def as_object(chat_format: ChatFormat, record: Record) -> dict[str, Any]:
    """The JSON object of a record; ``reason`` and ``detail`` are there only if it is left out."""
    found: dict[str, Any] = {
        "task": record.task,
        "split": record.split,
        "file": str(record.file),
        "line": record.line,
        "input_ids": record.input_ids,
        "supervised": record.encoded.supervised,
        "text": chat_format.decode(record.input_ids) if record.input_ids else None,
    }
    if record.truncated:
        found["truncated"] = True
    if record.reason is not None:
        found |= {"reason": record.reason, "detail": record.detail}
    return found


def _print_tables(datamodule: MFTDataModule, choice: Choice) -> list[TaskSurvey]:
    """The surveys of the task directories."""
    told = []
    for number, (corpus, tasks) in enumerate(choice.corpora(datamodule)):
        if number and tasks:
            say("", "validation directories")
        told.append([survey(corpus, task, datamodule.chat_format) for task in tasks])
        _say_table(told[-1], datamodule.policy.unit)
    if datamodule.policy.concat:
        say("", f"rows: records end to end, cut at {datamodule.policy.seq_length} tokens; a row's first is not learned")
        say("length: tokens of a record")
    else:
        say("", "length: tokens of a conversation, those included that are left out or cut as too long")
    say("one string: conversations that would be encoded otherwise if the whole text were tokenised at once")
    return told[0]


def _print_conversations(datamodule: MFTDataModule, choice: Choice) -> None:
    """Those that are trained on or evaluated."""
    groups = [(c, numbers[c.admission.outcome[numbers] == ADMITTED]) for c, numbers in choice.groups(datamodule)]
    total = sum(len(numbers) for _, numbers in groups)
    if choice.page is None and choice.limit is None:
        groups = [(corpus, numbers[:DEFAULT_SHOWN]) for corpus, numbers in groups]
    chosen = list(choice.paged(groups))
    screen = console()
    colour = screen.color_system is not None and not screen.no_color
    if chosen:
        say("", _legend(colour))
    for record in chosen:
        where = printable(f"{record.file}:{record.line}")
        title = f"--- {record.task}, {record.split}, {where}, {len(record.input_ids)} tokens"
        say("", Text(title, style="bold"))
        say(highlighted(datamodule.chat_format, record.encoded, colour=colour))
    if choice.page is not None:
        say("", f"page {choice.page} of {max(1, math.ceil(total / (choice.limit or PAGE)))}, {total:,} conversations")


def _say_table(surveys: list[TaskSurvey], unit: str) -> None:
    if not surveys:
        return
    columns = ("task", unit, "tokens", "supervised", "share", "length median", "p90", "p99", "max")
    rows = []
    for found in surveys:
        report = found.report
        readable = len(found.lengths)
        numbers = [sum(report.conversations.values()), report.tokens, report.supervised_tokens]
        share = f"{report.supervised_tokens / max(1, report.tokens):.1%}"
        lengths = [f"{quantile:,}" for quantile in found.quantiles()]
        counts = [f"{number:,}" for number in numbers]
        differing = f"{found.differing:,}" + (f" of first {found.compared:,}" if found.compared < readable else "")
        rows.append([report.task, *counts, share, *lengths, differing, left_out(report)])
    say(Grid([*columns, "one string", "left out"], rows, left=("left out",)))
    say(*notes([found.report for found in surveys]))


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
