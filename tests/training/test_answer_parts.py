"""Parts of answers: whole lines count, the rest of a killed writer does not."""

from __future__ import annotations

from pathlib import Path

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
