"""``convert-data``: Alpaca, ShareGPT and OpenAI files as the JSONL files of a task's directory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from mft_lightning.aside import written_aside
from mft_lightning.bars import WorkBar
from mft_lightning.data.records import BadRecord, parse_object
from mft_lightning.errors import UserError, first_line
from mft_lightning.key_errors import parse
from mft_lightning.moving_over.chat_forms import convert_record, form_of
from mft_lightning.moving_over.json_records import read_records
from mft_lightning.paths import given_file, given_path
from mft_lightning.screen import Grid, say, shown

_NAME = re.compile(r"(?P<stem>.*?)(\.jsonl|\.json)?(\.gz|\.zst)?", re.DOTALL | re.IGNORECASE)
POLICIES = ("error", "skip")


@dataclass
class Counts:
    """What became of a file's records."""

    source: Path
    form: str = ""
    read: int = 0
    written: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)


def convert_data(argv: list[str]) -> None:
    """Write each file's conversations as one of a task's directory, and count."""
    options = _options(argv)
    directory = given_path(options.output, "--output")
    sources = [given_path(source, "convert-data") for source in options["files"]]
    targets = _targets(sources, directory, overwrite=options.overwrite)
    counts = [Counts(source) for source in sources]
    try:
        with ExitStack() as whole:
            for count, target in zip(counts, targets, strict=True):
                _convert(count, whole.enter_context(written_aside(target)), skip=options.on_bad_record == "skip")
    except OSError as error:
        raise UserError(f"--output {directory}: cannot be written ({first_line(error)}).") from error
    _tell(counts, directory)


def _options(argv: list[str]) -> Namespace:
    parser = ArgumentParser(prog="python -m mft_lightning convert-data", exit_on_error=False)
    parser.add_argument("files", nargs="+", type=str, help="JSON arrays or JSON Lines, plain, .gz or .zst.")
    parser.add_argument("--output", type=str, required=True, help="The task's directory. Its name is the task's.")
    parser.add_argument(
        "--on_bad_record",
        type=str,
        default=POLICIES[0],
        help="error: stop at a record that is no usable conversation; skip: leave it out and count it.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace files of the same names.")
    options = parse(parser, argv)
    if not options.output:
        raise UserError("--output: is empty. Give the task's directory.")
    if options.on_bad_record not in POLICIES:
        raise UserError(f"--on_bad_record: {options.on_bad_record!r} is none of {', '.join(POLICIES)}.")
    return options


def _targets(sources: Sequence[Path], directory: Path, *, overwrite: bool) -> list[Path]:
    """The file to write for each."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--output {directory}: is no directory. Give the task's directory.")
    targets: dict[Path, Path] = {}
    for source in sources:
        match = _NAME.fullmatch(source.name)
        assert match is not None
        target = directory / f"{match['stem']}.jsonl"
        if target in targets:
            raise UserError(f"{targets[target]} and {source} would both be {target}. Rename one.")
        if target.exists() and source.exists() and target.samefile(source):
            raise UserError(f"{source}: would be written over itself. Give another --output.")
        if not overwrite and (target.exists() or target.is_symlink()):
            raise UserError(f"{target}: is there already. Give another --output, or --overwrite.")
        targets[given_file(target, "--output")] = source
    return list(targets)


def _convert(count: Counts, target: Path, *, skip: bool) -> None:
    """Write the conversations of one file.

    Raises:
        UserError: a record that is no usable conversation, unless such are to be skipped; one of another form than the
            first, or of none; or no record at all.
    """
    try:
        size = count.source.stat().st_size
    except OSError as error:
        raise UserError(f"{count.source}: cannot be read ({error.strerror}). Give a file that can.") from error
    with WorkBar(f"converting {count.source.name}", size, "records") as bar, target.open("w", encoding="utf-8") as out:
        for record in read_records(count.source):
            bar.reach(record.position, 1)
            count.read += 1
            try:
                read = parse_object(record.raw)
                form = _form(read, record.where, count)
                converted = convert_record(read, form)
            except BadRecord as error:
                if not skip:
                    spread = "; it may be one object over several lines: write each on one line, or an array"
                    what = f"{error.detail}{spread if record.raw == b'{' else ''}"
                    raise UserError(
                        f"{record.where}: {what}. Mend it, or leave such records out: --on_bad_record skip"
                    ) from error
                count.skipped[error.reason] += 1
                continue
            out.write(f"{converted.line}\n")
            count.written += 1
            count.left_out.update(dict.fromkeys(converted.left_out, 1))
    if not count.written:
        raise UserError(f"{count.source}: holds no conversation of {count.read} record(s). Nothing is written.")


def _form(record: dict[str, object], where: str, count: Counts) -> str:
    """The form of a record, which is that of all of its file."""
    try:
        form = form_of(record)
    except BadRecord as error:
        raise UserError(f"{where}: {error.detail}") from error
    count.form = count.form or form
    if form != count.form:
        raise UserError(f"{where}: is {form}, but the file began with {count.form}. Give one file for each form.")
    return form


def _tell(counts: Sequence[Counts], directory: Path) -> None:
    rows = [
        (count.source.name, count.form, f"{count.read:,}", f"{count.written:,}", f"{count.skipped.total():,}")
        for count in counts
    ]
    say(Grid(("file", "form", "records", "written", "skipped"), rows, left=("form",)))
    for count in counts:
        for reason, number in count.skipped.most_common():
            say(f"skipped of {count.source.name}: {number:,} {reason}")
        if count.left_out:
            fields = ", ".join(f"{name} ({number:,})" for name, number in count.left_out.most_common())
            say(f"left out of {count.source.name}: the fields {fields}")
    say("", f"task {directory.resolve().name}: {shown(directory.absolute())}")
