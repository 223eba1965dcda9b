"""Ranks that do not find each other say so and end, and who waits for another hears what happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPATIENT = """
import sys
from mft_lightning import cli, meeting
meeting.SILENCE, meeting.MEETING = 1, 4
sys.exit(cli.main(["fit"]))
"""
WAITING = """
import time
from mft_lightning import ranks
ranks.join()
try:
    with ranks.first_before_others("data"):
        print("first", flush=True)
        input()
        ranks.is_first_to_fail()
        time.sleep(3600)
except KeyboardInterrupt:
    print("interrupted")
    with ranks.first_before_others("data"):
        print("not reached")
"""
DEADLINE = 60.0  # seconds, on a machine that does other things too


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(program: str, address: str) -> list[subprocess.Popen[str]]:
    """Two ranks that meet at an address."""
    said = {"WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(free_port()), "PYTHONPATH": "."}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, **said, "RANK": rank, "LOCAL_RANK": rank},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


def test_a_meeting_place_that_no_host_has_is_told_by_every_rank() -> None:
    """Rank 0 too, which would else look for itself there."""
    ranks = start(IMPATIENT, "nowhere.invalid")
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


def test_an_interrupt_and_a_failure_are_heard_while_another_rank_prepares_the_data() -> None:
    ranks = start(WAITING, "127.0.0.1")
    try:
        assert ranks[0].stdout is not None and ranks[0].stdout.readline() == "first\n"
        time.sleep(1)  # the other comes to wait
        ranks[1].send_signal(signal.SIGINT)
        time.sleep(1)
        ranks[0].stdin.write("\n")
        ranks[0].stdin.flush()
        told, error = ranks[1].communicate(timeout=DEADLINE)
        assert told == "interrupted\n" and "LostPeerError" in error
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
