"""A bar tells how far work is, how fast it goes, and the time it has left."""

from __future__ import annotations

import pytest

from mft_lightning.bars import PLAIN_EVERY, WorkBar


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 1000.0
    monkeypatch.setattr("mft_lightning.bars.time.perf_counter", lambda: now)
    with WorkBar("tokenising sums", 400, "conversations") as bar:
        now += PLAIN_EVERY
        bar.reach(50, 2_000)
        assert capsys.readouterr().err == ""  # it is not yet time
        now += 10
        bar.reach(100, 2_000)
        assert capsys.readouterr().err == "tokenising sums: 25%  4,000 conversations  100/s  2:00 left\n"
        now += PLAIN_EVERY
        bar.reach(200, 3_000)
        assert capsys.readouterr().err == ""
        now += 10
        bar.reach(400, 1_000)
        assert capsys.readouterr().err == "tokenising sums: 100%  8,000 conversations  100/s  0:00 left\n"
