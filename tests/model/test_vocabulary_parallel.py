"""Ranks that share a head's vocabulary have the loss and the gradients of the whole head."""

from __future__ import annotations

import os

from tests.integration import preloaded


def test_a_head_on_two_ranks() -> None:
    environment = {**os.environ, "PYTHONPATH": str(preloaded.ROOT)}
    done = preloaded.run_on_ranks(2, ["tests/model/shared_head.py"], environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "all as whole\n"
