"""``inspect``: what the model will see and learn from, record by record, with the keys of ``fit``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby, islice
from typing import Any

from mft_lightning.commands.report import task_table
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.tasks import SPLITS
from mft_lightning.data.token_cache import Record, encode_records, refuse, split_codes, task_lines
from mft_lightning.errors import UserError
from mft_lightning.quiet import quieten
from mft_lightning.run_config import RunConfig

_LINE_BREAKS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}  # an object stays one line everywhere
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
    with suppress(BrokenPipeError):  # `inspect --json | head` is no error
        if config.config["json"]:
            _print_json(datamodule, limit)
        else:
            _print_table(datamodule, limit)


def records(datamodule: MFTDataModule) -> Iterator[tuple[str, str, Record]]:
    """(split, task name, record) of every line: by split, task, file and line."""
    sources = [(task, datamodule.shares) for task in datamodule.tasks]
    sources += [(task, (0.0, 1.0, 0.0)) for task in datamodule.valid_tasks]
    for number, split in enumerate(SPLITS):
        for task, shares in sources:
            codes = split_codes(task, shares, datamodule.seed)
            lines = (line for line, code in zip(task_lines(task), codes, strict=True) if code == number)
            for record in encode_records(lines, datamodule.chat_format, datamodule.policy):
                yield split, task.name, record


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
        line = json.dumps(as_object(datamodule, split, task, record), ensure_ascii=False)
        print(line.translate(_LINE_BREAKS))
        try:
            refuse(record, datamodule.policy)
        except UserError as error:
            refused = refused or error
    sys.stdout.flush()
    if refused is not None:
        raise refused


def _print_table(datamodule: MFTDataModule, limit: int | None) -> None:
    datamodule.setup()
    for line in task_table([*datamodule.reports, *datamodule.valid_reports]):
        print(line)
    for task, (count, differing) in _otherwise(datamodule).items():
        print(f"  {task}: {differing} of {count} conversations would be encoded otherwise as one string")
    print("\nsupervised text stands in [[double brackets]]")
    shown: dict[tuple[str, str], int] = {}
    for split, task, record in islice((r for r in records(datamodule) if r[2].reason is None), limit):
        shown[split, task] = shown.get((split, task), 0) + 1
        if limit is None and shown[split, task] > DEFAULT_SHOWN:
            continue
        assert record.encoded is not None
        print(f"\n--- {task}, {split}, {record.where}, {len(record.encoded.input_ids)} tokens")
        print(_marked(datamodule, record))


def _otherwise(datamodule: MFTDataModule) -> dict[str, tuple[int, int]]:
    """Of each task: its conversations, and how many a one-string tokenisation would encode otherwise."""
    found = {task.name: (0, 0) for task in datamodule.tasks}
    for _, task, record in records(datamodule):
        if record.conversation is not None:
            same = datamodule.chat_format.encodes_as_one_string([record.conversation])[0]
            count, differing = found[task]
            found[task] = (count + 1, differing + (not same))
    return found


def _marked(datamodule: MFTDataModule, record: Record) -> str:
    """What is trained on, as text, with the supervised stretches in brackets."""
    assert record.encoded is not None
    tokens = zip(record.encoded.input_ids, record.encoded.supervised, strict=True)
    parts = []
    for supervised, run in groupby(tokens, key=lambda token: token[1]):
        text = datamodule.chat_format.decode([i for i, _ in run])
        parts.append(f"[[{text}]]" if supervised else text)
    return "".join(parts)
