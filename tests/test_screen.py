"""The screen shows every cell at every width, and data cannot drive the terminal."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mft_lightning.screen import (
    Grid,
    console,
    duration,
    json_line,
    labelled,
    print_json,
    printable,
    program,
    say,
    shown,
)

GRID = Grid(
    ("task", "conversations", "supervised tokens", "left out"),
    [["code_explanation", "1,000", "123,456", "2 overlong"], ["x", "7", "", "0"]],
    left=("left out",),
)


def printed(width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width, markup=False, highlight=False).print(GRID)
    return file.getvalue()


@pytest.mark.parametrize("width", range(16, 100))
def test_a_table_loses_no_cell_at_any_width(width: int) -> None:
    words = [word.rstrip(",") for word in printed(width).split()]
    for row in GRID.rows:
        for cell in row:
            assert all(word in words for word in cell.split()), cell
    assert all(len(line) <= width for line in printed(width).splitlines())


def test_a_narrow_table_folds_its_names_then_turns_then_becomes_paragraphs() -> None:
    assert printed(80).splitlines()[0].rstrip() == "task              conversations  supervised tokens  left out"
    assert len(printed(80).splitlines()) == 3 and len(printed(63).splitlines()) == 4
    turned = [line.split() for line in printed(50).splitlines()]
    assert turned[0] == ["code_explanation", "x"] and turned[1] == ["conversations", "1,000", "7"] and len(turned) == 4
    assert printed(30).splitlines()[:2] == ["code_explanation", "  conversations 1,000, "]


def test_a_narrow_table_does_without_what_is_spare_and_says_so() -> None:
    file = io.StringIO()
    spare = replace(GRID, spare=("supervised tokens", "conversations"))
    Console(file=file, width=50).print(spare)
    lines = file.getvalue().splitlines()
    assert lines[0].split() == ["task", "conversations", "left", "out"] and len(lines) == 4
    assert lines[-1].rstrip() == "(a wider screen has supervised tokens too)"


def test_wide_letters_count_twice() -> None:
    file = io.StringIO()
    grid = Grid(("task", "tokens"), [["\u6570\u5b66\u9898\u76ee", "1"], ["x", "2"]])
    Console(file=file, width=40).print(grid)
    assert [line.rstrip() for line in file.getvalue().splitlines()][1:] == [
        "\u6570\u5b66\u9898\u76ee       1",
        "x              2",
    ]


def test_an_object_is_one_line_for_every_reader() -> None:
    value = {"a": "x\u2028y\x85z\n\u4e2d"}
    assert (
        len(json_line(value).splitlines()) == 1
        and json.loads(json_line(value)) == value
        and "\u4e2d" in json_line(value)
    )


def test_what_is_piped_stays_whole(capsys: pytest.CaptureFixture[str]) -> None:
    say("x" * 500, GRID, *labelled([("a", "y" * 500), ("longer", "z")]))
    lines = capsys.readouterr().out.splitlines()
    assert not any(line.endswith(" ") for line in lines)
    assert lines[0] == "x" * 500 and lines[-2] == "a       " + "y" * 500 and lines[-1] == "longer  z"
    assert console().color_system is None


def test_markup_in_data_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    say("[bold]:smile: 1.0[/bold]")
    assert capsys.readouterr().out == "[bold]:smile: 1.0[/bold]\n"


def test_control_characters_are_spelt_out() -> None:
    assert printable("\u202ea\u2028") == "\\u202ea\\u2028"
    assert printable("a\x1b[31mb\x85\tc\nd\x00\u4e2d") == "a\\x1b[31mb\\x85\tc\nd\\x00\u4e2d"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (3.4, "0:03"), (65, "1:05"), (599.6, "10:00"), (3665, "1:01:05"), (36000, "10:00:00")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_path_is_as_one_types_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "run" / "step-1") == "run/step-1"
    assert shown(tmp_path / "my run") == "'my run'"
    assert shown(Path("/elsewhere/x")) == "/elsewhere/x"
    assert shown(Path("some/hub-id")) == "some/hub-id"


def test_a_program_is_called_by_its_name_only_where_the_shell_finds_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = tmp_path / ".venv" / "bin"
    own.mkdir(parents=True)
    (own / "tensorboard").write_text("")
    (own / "tensorboard").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(own / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    assert program("tensorboard") == ".venv/bin/tensorboard"
    monkeypatch.setenv("PATH", str(own))
    assert program("tensorboard") == "tensorboard"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_valid_whatever_the_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw, value = io.BytesIO(), {"answer": "\u00e9 \u4e2d \U0001f600 \\xe9"}
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        print_json(value)
    assert json.loads(raw.getvalue().decode(encoding)) == value
    assert ("\u4e2d" in raw.getvalue().decode(encoding)) == (encoding == "utf-8")


def test_a_notebook_gets_lines_as_a_file_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not a block of HTML for each, nor codes for colours."""
    say("a line", "", GRID)
    in_a_file = capsys.readouterr().out
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert console().is_jupyter
    say("a line", "", GRID)
    assert capsys.readouterr().out == in_a_file and "\x1b" not in in_a_file
