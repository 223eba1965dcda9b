"""The data files of task directories."""

import os
import re
from pathlib import Path

import pytest

from mft_lightning.data.task_files import check_files, find_files
from mft_lightning.data.tasks import Task
from mft_lightning.errors import UserError


def test_task_files_are_the_jsonl_files_by_name(tmp_path: Path) -> None:
    passed_over = ["c.json", "notes.txt", ".jsonl.swp", "._b.jsonl", ".jsonl", ".a.jsonl.zst", "d.jsonl.xz", "jsonl"]
    for name in ["c.jsonl.zst", "b.jsonl", "a.jsonl.gz", "e.jsonl.zst.gz", *passed_over]:
        (tmp_path / name).touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "b2.jsonl").symlink_to("b.jsonl")
    assert find_files(Task("task", tmp_path)).data == [
        tmp_path / name for name in ["a.jsonl.gz", "b.jsonl", "b2.jsonl", "c.jsonl.zst"]
    ]


def not_listed(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        find_files(Task("task", directory))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing", "No such file or directory"),
        ("file.jsonl", "Not a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("dangling", "No such file or directory"),
        ("x" * 300, "File name too long"),
        ("nul\0", "(scandir: )?embedded null (byte|character in path)"),  # as Python 3.13 says it
    ],
)
def test_a_task_directory_that_is_none_is_an_error_that_names_it(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "file.jsonl").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("missing")
    message = not_listed(tmp_path / name)
    assert f"{tmp_path / name} is not a directory that can be read (" in message
    assert re.search(rf" \({why}\)\. Give the task's directory", message)


def test_a_directory_that_may_not_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert f"{tmp_path} is not a directory that can be read (Permission denied)" in not_listed(tmp_path)


def test_a_task_directory_without_jsonl_is_an_error_that_says_what_it_holds(tmp_path: Path) -> None:
    assert f"no *.jsonl file in {tmp_path} (it holds nothing)" in not_listed(tmp_path)
    (tmp_path / "train.json").touch()
    (tmp_path / "._a.jsonl").touch()
    assert "(it holds ._a.jsonl, train.json). convert-data makes such files of JSON arrays" in not_listed(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_data_file_that_is_none_is_told_not_passed_over(tmp_path: Path, name: str) -> None:
    (tmp_path / "good.jsonl").touch()
    file = tmp_path / name
    for why, make in {
        "a directory": file.mkdir,
        "a link: No such file or directory": lambda: file.symlink_to("gone"),
        "a link: Too many levels of symbolic links": lambda: file.symlink_to(name),
        "a pipe or a device": lambda: os.mkfifo(file),
    }.items():
        make()
        assert f"{file}: is named as a data file but is none ({why})" in not_listed(tmp_path)
        if why == "a directory":
            file.rmdir()
        else:
            file.unlink()


@pytest.mark.parametrize(
    ("one", "other"), [("a.jsonl", "a.jsonl.gz"), ("a.jsonl", "a.jsonl.zst"), ("a.jsonl.gz", "a.jsonl.zst")]
)
def test_one_name_plain_and_compressed_is_an_error_that_names_both(tmp_path: Path, one: str, other: str) -> None:
    for name in [one, other, "b.jsonl"]:
        (tmp_path / name).touch()
    assert f"{tmp_path}: {one} and {other} have one name" in not_listed(tmp_path)


def test_what_looks_like_data_and_is_not_read_is_found(tmp_path: Path) -> None:
    for name in ["a.jsonl", "B.JSONL", "c.json", "d.jsonl.xz", "e.ndjson", "f.jsonlines", ".g.jsonl", "notes.md"]:
        (tmp_path / name).touch()
    for name in ["h.jsonl-00001", "i.jsonl_old", "j.jsonl~", "k.jsonlx"]:
        (tmp_path / name).touch()
    for name in ["deep", "deep/er", "empty", ".hidden"]:
        (tmp_path / name).mkdir()
    for name in ["deep/er/h.jsonl.gz", ".hidden/i.jsonl"]:
        (tmp_path / name).touch()
    found = find_files(Task("task", tmp_path))
    assert found.data == [tmp_path / "a.jsonl"]
    expected = ["B.JSONL", "c.json", "d.jsonl.xz", "deep", "e.ndjson", "f.jsonlines"]
    assert found.unread == [*expected, "h.jsonl-00001", "i.jsonl_old", "j.jsonl~"]


def test_errors_name_the_key_that_the_directory_came_from(tmp_path: Path) -> None:
    for directory in [tmp_path, tmp_path / "gone"]:
        with pytest.raises(UserError, match=r"^data\.valid_data_paths: "):
            find_files(Task("task", directory, "data.valid_data_paths"))


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize("second", ["one/b.jsonl", "two/a.jsonl.gz"])
def test_a_file_that_is_there_twice_is_refused(tmp_path: Path, link: str, second: str) -> None:
    tasks = [Task(name, tmp_path / name) for name in ["one", "two"]]
    for task in tasks:
        task.directory.mkdir()
        (task.directory / f"{task.name}.jsonl").write_text("{}")
    check_files(tasks)
    first = tmp_path / "one" / "a.jsonl"
    first.touch()
    getattr(tmp_path / second, link)(first)
    with pytest.raises(UserError) as caught:
        check_files(tasks)
    assert str(caught.value).startswith(f"{tmp_path / second}: is the same file as {first}, by a link.")
