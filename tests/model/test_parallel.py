"""A sharded network holds, gives and answers what the whole one does."""

from __future__ import annotations

import os
from pathlib import Path

from tests.integration import preloaded


def test_a_sharded_network_on_two_ranks(tiny_model: Path) -> None:
    words = ["tests/model/on_two_ranks.py", str(tiny_model)]
    done = preloaded.run_on_ranks(2, words, {**os.environ, "PYTHONPATH": str(preloaded.ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "all as before\n"
