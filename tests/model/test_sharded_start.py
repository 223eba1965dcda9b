"""No rank holds the whole model while a sharded run starts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT, user_environment

PYTHON = 24.0  # MiB that the start needs for other things than weights


def test_a_rank_needs_its_share_and_one_unit() -> None:
    """The whole model, built before it is sharded, shows that the measure would tell."""
    if not sys.platform.startswith("linux"):
        pytest.skip("private memory is read from Linux's /proc")
    shape = ("--hidden", "768", "--layers", "8", "--vocabulary", "4096", "--ranks", "2", "--kinds", "random,whole")
    done = subprocess.run(
        [sys.executable, "benchmarks/sharded_start.py", *shape],
        cwd=ROOT,
        env=user_environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    peaks = {row[0]: (float(row[5]), float(row[4]), float(row[2])) for row in rows}
    assert peaks.keys() == {"random", "whole"}
    peak, bound, _ = peaks["random"]
    assert 0.9 * bound < peak < bound + PYTHON
    peak, bound, model = peaks["whole"]
    assert peak > model > bound + PYTHON
