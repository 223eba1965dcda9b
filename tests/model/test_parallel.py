"""A sharded network holds, gives and answers what the whole one does."""

from __future__ import annotations

import os
from pathlib import Path

from tests.integration import preloaded


def test_a_sharded_network_on_two_ranks(tiny_model: Path) -> None:
    _run(2, "tests/model/on_two_ranks.py", str(tiny_model))


def test_a_network_that_is_cut_and_sharded_on_four_ranks() -> None:
    _run(4, "tests/model/on_four_ranks.py")


def _run(ranks: int, *words: str) -> None:
    done = preloaded.run_on_ranks(ranks, [*words], {**os.environ, "PYTHONPATH": str(preloaded.ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "all as before\n"
