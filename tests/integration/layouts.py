"""Runs on several ranks, and how far their results are apart."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch

from tests.integration import preloaded
from tests.integration.conftest import user_environment


def in_series(ranks: int, lines: list[list[str]], directory: Path, script: str = "in_series.py") -> str:
    """Run command lines one after the other on so many ranks; what they print."""
    (directory / "commands.json").write_text(json.dumps(lines))
    words = [f"tests/integration/{script}", str(directory / "commands.json")]
    done = preloaded.run_on_ranks(ranks, words, user_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"\wWarning: ", done.stderr), (
        done.stderr
    )  # of Python: that an option costs time, torch may say
    return done.stdout


def differ(ours: list[dict[str, str]], theirs: list[dict[str, str]]) -> float:
    """The largest relative difference of any metric at any step; all of them must be there."""
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    worst = 0.0
    for row, other in zip(ours, theirs, strict=True):
        assert {name for name in row if row[name]} == {name for name in other if other[name]}
        values = [(float(row[name]), float(other[name])) for name in row if row[name]]
        assert all(math.isfinite(value) for pair in values for value in pair)
        worst = max(worst, *(abs(a - b) / max(abs(a), 1e-12) for a, b in values))
    return worst


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of any two weights."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)
