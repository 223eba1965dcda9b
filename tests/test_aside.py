"""What is written aside is there whole or not at all, whenever the process ends."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from mft_lightning.aside import remove_directory, remove_unfinished, written_aside
from tests.crashes import ended_before_change

PARTS = {"a": "first", "b": "second"}


def write_parts(directory: Path) -> None:
    with written_aside(directory) as aside:
        (aside / "deep").mkdir(parents=True)
        for name, text in PARTS.items():
            (aside / "deep" / name).write_text(text)


def parts(directory: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in (directory / "deep").iterdir()}


def test_a_directory_is_whole_or_not_there_whenever_the_process_ends(tmp_path: Path) -> None:
    for number in count():
        directory = tmp_path / str(number) / "directory"
        cut = ended_before_change(number, lambda target=directory: write_parts(target))
        assert cut is not directory.exists()
        if not cut:
            break
        write_parts(directory)  # what the kill left is in nobody's way
    assert number > 4
    assert parts(directory) == PARTS


def test_a_file_is_the_old_or_the_new_one_whenever_the_process_ends(tmp_path: Path) -> None:
    file = tmp_path / "file"

    def write() -> None:
        with written_aside(file) as aside:
            aside.write_text("new")

    for number in count():
        file.write_text("old")
        if not ended_before_change(number, write):
            break
        assert file.read_text() == "old"
    assert number > 1 and file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_removed_directory_is_whole_or_gone_whenever_the_process_ends(tmp_path: Path) -> None:
    for number in count():
        directory = tmp_path / str(number) / "directory"
        write_parts(directory)
        cut = ended_before_change(number, lambda target=directory: remove_directory(target))
        assert not directory.exists() or parts(directory) == PARTS
        remove_unfinished(directory.parent)
        assert [path.name for path in directory.parent.iterdir()] == ["directory"] * directory.exists()
        if not cut:
            break
    assert number > 2


def test_an_error_leaves_everything_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), written_aside(file) as aside:
        aside.write_text("new")
        1 / 0  # noqa: B018
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_a_directory_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    write_parts(tmp_path / "directory")
    with pytest.raises(OSError, match="not empty"):
        write_parts(tmp_path / "directory")
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]


def test_a_failure_leaves_no_parent_that_was_not_there_and_no_parent_of_others(tmp_path: Path) -> None:
    def fail_at(path: Path, beside: str | None = None) -> None:
        with pytest.raises(OSError, match="full"), written_aside(path) as aside:
            aside.mkdir()
            if beside is not None:
                (path.parent / beside).write_text("mine")
            raise OSError("full")

    fail_at(tmp_path / "new" / "newer" / "directory")
    assert not list(tmp_path.iterdir())
    fail_at(tmp_path / "new" / "newer" / "directory", beside="file")
    assert [path.name for path in (tmp_path / "new" / "newer").iterdir()] == ["file"]
