"""Parts of answers: whole lines count, the rest of a killed writer does not."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mft_lightning.errors import UserError
from mft_lightning.training.answer_parts import AnswerParts

ANSWERS = [{"answer": "a\nb\u2028", "finished": True, "exact": False}]


def test_a_killed_writer_leaves_whole_lines_wherever_it_was_killed(tmp_path: Path) -> None:
    parts = AnswerParts(tmp_path / "answers.jsonl", {"--seed": 1})
    with parts.opened(overwrite=False):
        writer = parts.writer(0)
        writer.add(3, ANSWERS)
        writer.add(1, ANSWERS * 2)
        writer.close()
        other = parts.writer(1)
        other.add(2, ANSWERS)
        other.close()
    file = parts.directory / "part-00000.jsonl"
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    assert parts.read() == {3: ANSWERS, 1: ANSWERS * 2, 2: ANSWERS}
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        left = {3: ANSWERS} if length >= first else {}
        assert parts.read() == {**left, 2: ANSWERS}
        writer = parts.writer(0)
        writer.add(7, ANSWERS)
        writer.close()
        assert parts.read() == {**left, 7: ANSWERS, 2: ANSWERS}


def test_one_run_at_a_time_and_none_that_was_not_asked_for(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "answers.jsonl"
    with AnswerParts(output, {"--seed": 1}).opened(overwrite=False):
        assert not output.exists()
    with AnswerParts(output, {"--seed": 2}).opened(overwrite=False):  # nothing was answered: no parts of another
        writer = AnswerParts(output, {}).writer(0)
        writer.add(0, ANSWERS)
        writer.close()
    with (
        pytest.raises(UserError, match="--seed was 2, is 1"),
        AnswerParts(output, {"--seed": 1}).opened(overwrite=False),
    ):
        pass
    with AnswerParts(output, {"--seed": 1}).opened(overwrite=True):
        assert AnswerParts(output, {}).read() == {}


@pytest.mark.parametrize("damage", [b"[1]", b'{"batch": 9, "answers": []}', b'"crc32"', b""], ids=str)
def test_a_damaged_line_is_told_of_though_it_is_json(tmp_path: Path, damage: bytes) -> None:
    parts = AnswerParts(tmp_path / "answers.jsonl", {"--seed": 1})
    with parts.opened(overwrite=False):
        writer = parts.writer(0)
        writer.add(3, ANSWERS)
        writer.close()
    file = parts.directory / "part-00000.jsonl"
    file.write_bytes(file.read_bytes() + damage + b"\n")
    with pytest.raises(UserError, match=r"part-00000\.jsonl:2: is damaged"):
        parts.read()
    file.write_bytes(file.read_bytes().split(b"\n")[0].replace(b"false", b"true") + b"\n")
    with pytest.raises(UserError, match=r"part-00000\.jsonl:1: is damaged"):
        parts.read()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_while_parts_are_removed_leaves_none_that_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """Killed before each removal, of parts whose answers are written, or that are to be overwritten."""
    parts = AnswerParts(tmp_path / "answers.jsonl", {"--seed": 1})
    for survived in range(6):
        with parts.opened(overwrite=True):
            for rank in range(3):
                writer = parts.writer(rank)
                writer.add(rank, ANSWERS)
                writer.close()
        removed = []

        def unlink(path: Any, *given: Any, left: list[Any] = removed, survived: int = survived, **named: Any) -> None:
            if len(left) == survived and Path(path).name != ".lock":
                raise KeyboardInterrupt
            left.append(path)
            os.remove(path, *given, **named)

        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr("os.unlink", unlink)
            if overwrite:
                with parts.opened(overwrite=True):
                    pass
            else:
                parts.remove()
        with AnswerParts(parts.output, {"--seed": 1 if survived == 0 else 2}).opened(overwrite=False):
            assert len(parts.read()) == (3 if survived == 0 else 0)
