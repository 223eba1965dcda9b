"""Files to lines: numbering, compression, bounded memory, and which files of a directory are data."""

import gzip
from pathlib import Path

import pytest

from mft_lightning.data.lines import read_lines, task_files
from mft_lightning.errors import UserError

BOM = b"\xef\xbb\xbf"


def lines_of(tmp_path: Path, content: bytes, name: str = "a.jsonl") -> list[tuple[int, bytes]]:
    file = tmp_path / name
    file.write_bytes(content)
    lines = list(read_lines(file))
    assert all(line.file == file for line in lines)
    return [(line.number, line.raw) for line in lines]


def test_blank_lines_are_left_out_and_still_counted(tmp_path: Path) -> None:
    assert lines_of(tmp_path, b'\n{"a": 1}\n \t \n\n{"b": 2}') == [(2, b'{"a": 1}'), (5, b'{"b": 2}')]


def test_crlf_and_a_byte_order_mark_at_the_start_are_taken_off(tmp_path: Path) -> None:
    assert lines_of(tmp_path, BOM + b'{"a": 1}\r\n\r\n{"b": 2}\r\n') == [(1, b'{"a": 1}'), (3, b'{"b": 2}')]


def test_a_byte_order_mark_is_taken_off_at_the_start_only(tmp_path: Path) -> None:
    assert lines_of(tmp_path, b"1\n" + BOM + b"2\n") == [(1, b"1"), (2, BOM + b"2")]


def test_a_file_of_a_byte_order_mark_alone_has_no_line(tmp_path: Path) -> None:
    assert lines_of(tmp_path, BOM + b"\r\n") == []


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path) -> None:
    raw = '{"text": "a\u2028b\u0085c"}'.encode()
    assert lines_of(tmp_path, raw + b"\n") == [(1, raw)]


def test_gzip_is_read_like_plain_text(tmp_path: Path) -> None:
    content = BOM + b'{"a": 1}\r\n\n{"b": 2}\n'
    assert lines_of(tmp_path, gzip.compress(content), "a.jsonl.gz") == lines_of(tmp_path, content)


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress(b'{"a": 1}\n' * 99)[:-9]], ids=["no gzip", "cut off"])
def test_a_broken_gzip_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be read"):
        lines_of(tmp_path, content, "a.jsonl.gz")


def test_task_files_are_the_jsonl_files_by_name(tmp_path: Path) -> None:
    for name in ["b.jsonl", "a.jsonl.gz", "c.json", "notes.txt", ".jsonl.swp"]:
        (tmp_path / name).touch()
    assert [file.name for file in task_files(tmp_path)] == ["a.jsonl.gz", "b.jsonl"]


def test_a_task_directory_that_is_missing_or_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").touch()
    for name in ["missing", "file.jsonl"]:
        with pytest.raises(UserError, match=rf"{name} is not a directory"):
            task_files(tmp_path / name)


def test_a_task_directory_without_jsonl_is_an_error_that_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \*\.jsonl file .*it holds nothing"):
        task_files(tmp_path)
    (tmp_path / "train.json").touch()
    with pytest.raises(UserError, match=r"it holds train\.json"):
        task_files(tmp_path)
