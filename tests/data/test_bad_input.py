"""Bad input on its way through the encoder: each line is text that is kept, or is refused by file, line and field."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from mft_lightning.data.admission import RecordPolicy, TaskReport
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.corpus import Corpus, Record
from mft_lightning.data.lines import MAX_LINE
from mft_lightning.data.tasks import Task, find_tasks
from mft_lightning.errors import UserError
from tests.data.tables import loaded
from tests.data.test_records import BAD, BOM, KEPT

GOOD = b'{"prompt": "q", "answer": "a"}'


def task_of(tmp_path: Path, content: bytes, name: str = "part.jsonl") -> Task:
    directory = tmp_path / "task"
    directory.mkdir(exist_ok=True)
    (directory / name).write_bytes(content)
    return Task("task", directory)


def policy(on_bad_record: Any) -> RecordPolicy:
    return RecordPolicy(seq_length=10_000, on_overlong="drop", on_bad_record=on_bad_record, max_skipped_share=1.0)


def corpus(tokenizer: PreTrainedTokenizerBase, task: Task, on_bad_record: str) -> Corpus:
    cache_dir = task.directory.with_name("cache")
    return loaded([task], (1.0, 0.0, 0.0), ChatFormat(tokenizer), policy(on_bad_record), cache_dir)


def encoded(tokenizer: PreTrainedTokenizerBase, task: Task) -> list[Record]:
    found = corpus(tokenizer, task, "skip")
    return [found.record(number) for number in range(len(found.codes))]


def built(tokenizer: PreTrainedTokenizerBase, task: Task, on_bad_record: str) -> TaskReport:
    return corpus(tokenizer, task, on_bad_record).reports[0]


def answer_of(tokenizer: PreTrainedTokenizerBase, record: Record) -> str:
    pairs = zip(record.input_ids, record.encoded.supervised, strict=True)
    *answer, eos = [token for token, supervised in pairs if supervised]
    assert eos == tokenizer.eos_token_id and not {eos, tokenizer.pad_token_id} & set(answer)
    return ChatFormat(tokenizer).decode(answer)


# --- lines that are refused


@pytest.mark.parametrize(("raw", "reason", "names"), BAD.values(), ids=BAD.keys())
def test_a_bad_line_is_told_by_file_line_field_and_reason(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, raw: bytes, reason: str, names: str
) -> None:
    task = task_of(tmp_path, b"\n" + GOOD + b"\r\n" + raw + b"\n" + GOOD)
    where = f"{task.directory / 'part.jsonl'}:3"
    first, bad, last = encoded(small_tokenizer, task)
    assert (bad.reason, f"{bad.file}:{bad.line}", bad.input_ids, bad.spans) == (reason, where, [], [])
    assert bad.detail is not None and names in bad.detail
    assert (first.reason, first.line, last.reason, last.line) == (None, 2, None, 4)
    report = built(small_tokenizer, task, "skip")
    assert (report.records, report.bad, report.conversations["train"]) == (3, 1, 2)
    assert report.dropped == {reason: 1} and report.first_of == {reason: f"{where} {bad.detail}"}
    with pytest.raises(UserError) as caught:
        built(small_tokenizer, task, "error")
    assert str(caught.value).startswith(f"{where}: {bad.detail} [{reason}]. Mend the line")


@pytest.mark.parametrize(
    ("content", "line", "reason", "names"),
    [
        (GOOD + b"\n" + GOOD[:-9], 2, "invalid-json", "at column"),
        (json.dumps([json.loads(GOOD)] * 2, indent=2).encode(), 1, "invalid-json", "write one object per line"),
        (json.dumps([json.loads(GOOD)] * 2).encode(), 1, "not-an-object", "write one object per line"),
        (b"[" + GOOD + b",\n" + GOOD + b"]", 1, "invalid-json", "write one object per line"),
        (GOOD + b"\n" + BOM + GOOD, 2, "invalid-json", "BOM"),
        (GOOD + b"\r" + GOOD, 1, "invalid-json", "Extra data"),
        (GOOD.decode().encode("utf-16"), 1, "not-utf8", "UTF-8"),
        (GOOD + b"\n" + b"\0" * 4096, 2, "invalid-json", "a NUL"),
        (b'{\n"prompt": "q", "answer": "a"}', 1, "invalid-json", "column 2"),
        (GOOD + b"\n\n" + b" " * (MAX_LINE + 1) + GOOD, 3, "line-too-long", "8 MiB"),
    ],
    ids=[
        "truncated last line",
        "array printed pretty",
        "array in one line",
        "array in two lines",
        "byte order mark inside",
        "carriage returns alone",
        "utf-16",
        "NULs at the end",
        "object over two lines",
        "blanks without end",
    ],
)
@pytest.mark.parametrize("other", ["a file of blanks", "an empty file", "no other file"])
def test_a_bad_file_is_told_by_its_first_bad_line(
    small_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    content: bytes,
    line: int,
    reason: str,
    names: str,
    other: str,
) -> None:
    task = task_of(tmp_path, content)
    if other != "no other file":
        task_of(tmp_path, b"" if other == "an empty file" else b"\n \n\r\n", "a.jsonl")
    with pytest.raises(UserError) as caught:
        built(small_tokenizer, task, "error")
    message = str(caught.value)
    assert message.startswith(f"{task.directory / 'part.jsonl'}:{line}: ")
    assert f"[{reason}]" in message and names in message


def test_a_line_of_200_mb_is_refused_in_little_memory(small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    task = task_of(tmp_path, GOOD)
    with (task.directory / "part.jsonl").open("wb") as out:
        out.write(GOOD + b'\n{"prompt": "q", "answer": "')
        for _ in range(200):
            out.write(b"x" * 1_000_000)
        out.write(b'"}\n' + GOOD)
    tracemalloc.start()
    report = built(small_tokenizer, task, "skip")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (report.records, report.dropped) == (3, {"line-too-long": 1})
    assert report.first_of["line-too-long"].startswith(f"{task.directory / 'part.jsonl'}:2 is longer")
    assert peak < 100 << 20


# --- lines that are kept


@pytest.mark.parametrize("text", KEPT.values(), ids=KEPT.keys())
def test_text_is_trained_on_as_it_stands(small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, text: str) -> None:
    raw = json.dumps({"prompt": text, "answer": text}, ensure_ascii=False).encode()
    (record,) = encoded(small_tokenizer, task_of(tmp_path, raw))
    assert record.reason is None
    assert answer_of(small_tokenizer, record) == text


@pytest.mark.parametrize(
    ("content", "numbers"),
    [
        (GOOD, [1]),
        (BOM + GOOD + b"\n", [1]),
        (GOOD + b"\r\n\r\n" + GOOD + b"\r\n", [1, 3]),
        (b"\n\n \t\n" + GOOD + b"\n\n", [4]),
    ],
    ids=["no line end", "byte order mark", "CRLF", "blank lines"],
)
def test_what_editors_leave_around_a_line_is_no_fault(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, content: bytes, numbers: list[int]
) -> None:
    records = encoded(small_tokenizer, task_of(tmp_path, content))
    assert [(record.line, record.reason) for record in records] == [(number, None) for number in numbers]
    assert [answer_of(small_tokenizer, record) for record in records] == ["a"] * len(numbers)


# --- files and directories


def test_a_task_of_blank_lines_alone_is_an_error(small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    task_of(tmp_path, b"", "a.jsonl")
    with pytest.raises(UserError, match="task 'task' is empty"):
        built(small_tokenizer, task_of(tmp_path, b"\n \n"), "error")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("no data file", "no *.jsonl file in {}"),
        ("unreadable file", "{}/a.jsonl: is named as a data file but is none (a directory)"),
        ("file that links to itself", "{}/a.jsonl: is named as a data file but is none (a link: Too many levels"),
        ("directory that links to itself", "{} is not a directory that can be read (Too many levels"),
        ("one name twice", "{}: a.jsonl and a.jsonl.gz have one name"),
        ("damaged file", "{}/a.jsonl.zst: cannot be read ("),
    ],
)
def test_a_directory_that_is_wrong_is_told(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, wrong: str, message: str
) -> None:
    directory = tmp_path / "task"
    if wrong == "directory that links to itself":
        directory.symlink_to(directory)
    else:
        directory.mkdir()
        (directory / "good.jsonl").write_bytes(GOOD)
    if wrong == "no data file":
        (directory / "good.jsonl").rename(directory / "good.json")
    elif wrong == "unreadable file":
        (directory / "a.jsonl").mkdir()
    elif wrong == "file that links to itself":
        (directory / "a.jsonl").symlink_to("a.jsonl")
    elif wrong == "one name twice":
        (directory / "a.jsonl").touch()
        (directory / "a.jsonl.gz").touch()
    elif wrong == "damaged file":
        (directory / "a.jsonl.zst").write_bytes(GOOD)
    with pytest.raises(UserError) as caught:
        built(small_tokenizer, *find_tasks([str(directory)]), "error")
    assert message.format(directory) in str(caught.value)
