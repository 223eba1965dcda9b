"""Ranks that do not find each other say so, and end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPATIENT = """
import sys
from mft_lightning import cli, meeting
meeting.SILENCE, meeting.MEETING = 1, 4
sys.exit(cli.main(["fit"]))
"""
DEADLINE = 60.0  # seconds, on a machine that does other things too


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_meeting_place_that_no_host_has_is_told_by_every_rank() -> None:
    """Rank 0 too, which would else look for itself there."""
    said = {"WORLD_SIZE": "2", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": str(free_port()), "PYTHONPATH": "."}
    ranks = []
    for rank in ("0", "1"):
        environment = {**os.environ, **said, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-c", IMPATIENT]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        told = [rank.communicate(timeout=DEADLINE)[1].splitlines() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 1]
    for waiting, error in told:
        assert waiting.startswith("waiting for the other ranks") and "MASTER_ADDR=nowhere.invalid" in waiting
        assert "error: " in error and "not all ranks came within" in error
    assert ": nowhere.invalid cannot be reached ([Errno" in told[1][0]
