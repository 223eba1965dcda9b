"""Paths that users give: what cannot be one is an error like any other, and only regular files are written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mft_lightning.errors import UserError
from mft_lightning.paths import given_file, given_path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("~nosuchuser/x", "--key ~nosuchuser/x: nobody has that home directory"),
        ("x" * 300, r"cannot be used \(File name too long\)"),
        ("a\0b", r"cannot be used \((embedded null byte|stat: embedded null character in path)\)"),
    ],
)
def test_what_can_be_no_path_is_refused(given: str, message: str) -> None:
    for check in (given_path, given_file):
        with pytest.raises(UserError, match=message):
            check(given, "--key")


def test_a_home_is_expanded_and_nothing_need_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert given_path("~/x", "--key") == given_file("~/x", "--key") == tmp_path / "x"
    assert given_path("/dev/null/x", "--key") == Path("/dev/null/x")


def test_only_a_regular_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for link, target in (("link", "file"), ("dangling", "nothing")):
        (tmp_path / link).symlink_to(tmp_path / target)
    assert given_file(tmp_path / "file", "--key") == tmp_path / "file"
    for name, message in (
        ("pipe", "is no regular file"),
        ("link", "is a link"),
        ("dangling", "is a link"),
        (".", "is a directory"),
        ("x" * 250, "File name too long"),  # there is no room for the name that it is written under
    ):
        with pytest.raises(UserError, match=message):
            given_file(tmp_path / name, "--key")
