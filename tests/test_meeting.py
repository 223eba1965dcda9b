"""Ranks that do not find each other say so and end, and who waits for another hears what happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from mft_lightning.meeting import host_store

ROOT = Path(__file__).resolve().parents[1]
STARTED = """
import sys
from mft_lightning import cli, meeting
meeting.SILENCE, meeting.MEETING, meeting.HEARD = {seconds}
sys.exit(cli.main(["fit"]))
"""
SECOND_IS_ENDED_IN_ITS_IMPORTS = """
import os, signal, sys
class Watch:
    def find_spec(self, name, *given):
        if name == "torch" and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Watch())
"""
MEETING = """
import os, time
time.sleep(float(os.environ.get("LATE", "0")))
from mft_lightning import ranks
ranks.join()
print("met", flush=True)
os._exit(0)
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


def start(program: str, address: str, *differ: dict[str, str], **more: str) -> list[subprocess.Popen[str]]:
    """Ranks that meet at an address, two if nothing differs.

    Args:
        program: what each runs.
        address: where.
        differ: variables of the environment that each has.
        more: those that both have.
    """
    said = {"WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(free_port()), "PYTHONPATH": "."}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, **said, "RANK": str(rank), "LOCAL_RANK": str(rank), **more, **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(differ or ({}, {}))
    ]


def told_by(ranks: list[subprocess.Popen[str]]) -> list[str]:
    """What each says until it ends, which it must."""
    try:
        return [rank.communicate(timeout=DEADLINE)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def test_a_meeting_place_that_no_host_has_is_told_by_every_rank() -> None:
    """Rank 0 too, which would else look for itself there."""
    ranks = start(STARTED.format(seconds="1, 4, 1"), "nowhere.invalid")
    told = [said.splitlines() for said in told_by(ranks)]
    assert [rank.returncode for rank in ranks] == [1, 1]
    for waiting, error in told:
        assert waiting.startswith("waiting for the other ranks") and "MASTER_ADDR=nowhere.invalid" in waiting
        assert "error: " in error and "not all ranks came within" in error
    assert ": nowhere.invalid cannot be reached ([Errno" in told[1][0]
    assert told[0][0].endswith(": not there: rank 1")


# As if each of the two ranks were on a host of its own, and another one that never comes.
HOSTS = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"}
PATIENT = STARTED.format(seconds="5, 3600, 1")
LOST_AS_ALL_CONNECT = """
import os, sys
from mft_lightning import cli, ranks
ranks.CONNECTING = 3
if os.environ["RANK"] == "1":
    ranks._connect = lambda store: os._exit(9)
sys.exit(cli.main(["fit"]))
"""


def test_what_a_launcher_starts_at_once_is_not_waited_for_long() -> None:
    """torchrun tells no host of a rank that ends on another one before it can say so."""
    together = STARTED.replace("meeting.MEETING", "meeting.TOGETHER")
    launched = {**HOSTS, "TORCHELASTIC_RUN_ID": "own"}
    (told,) = told_by(ranks := start(together.format(seconds="1, 1, 1"), "127.0.0.1", {}, **launched))
    assert ranks[0].returncode == 1
    waiting, error = told.splitlines()
    assert waiting.startswith("waiting for the other ranks")
    seconds = int(error.removeprefix("error: not all ranks came within ").split()[0])
    assert seconds > 1  # ten times what the import of torch took
    assert (
        "not there: rank 1, 2. Their hosts tell why; where they only start slower, set MFT_LIGHTNING_MEETING" in error
    )


def test_how_long_a_launcher_s_ranks_are_waited_for_can_be_said() -> None:
    launched = {**HOSTS, "TORCHELASTIC_RUN_ID": "own"}
    (told,) = told_by(start(PATIENT, "127.0.0.1", {}, **launched, MFT_LIGHTNING_MEETING="1"))
    assert "not all ranks came within 1 seconds" in told
    (told,) = told_by(start(PATIENT, "127.0.0.1", {}, **launched, MFT_LIGHTNING_MEETING="1 min"))
    assert "error: MFT_LIGHTNING_MEETING=1 min is no number of seconds." in told


def test_a_rank_that_is_lost_as_all_connect_ends_the_others() -> None:
    told = told_by(ranks := start(LOST_AS_ALL_CONNECT, "127.0.0.1"))
    assert [rank.returncode for rank in ranks] == [1, 9]
    assert "error: the ranks had all come, but could not be connected (" in told[0]


def test_a_rank_that_gloo_would_not_find_is_told_by_all() -> None:
    lost = {"GLOO_SOCKET_IFNAME": "eth99"}
    told = told_by(ranks := start(PATIENT, "127.0.0.1", {}, lost, **HOSTS))
    assert [rank.returncode for rank in ranks] == [1, 1]
    for error, rank in zip(told, ("", "rank 1: "), strict=True):
        assert f"error: {rank}on the host {socket.gethostname()}, rank 1: GLOO_SOCKET_IFNAME=eth99 is no netw" in error


def test_a_rank_that_is_ended_while_it_starts_is_told_by_the_others() -> None:
    """As torchrun ends the neighbours of one that was killed. The first may be there later than it."""
    program = SECOND_IS_ENDED_IN_ITS_IMPORTS + STARTED.format(seconds="5, 3600, 10")
    told = told_by(ranks := start(program, "127.0.0.1", **HOSTS))
    assert [rank.returncode for rank in ranks] == [1, -signal.SIGTERM]
    assert f"error: on the host {socket.gethostname()}, rank 1: ended by SIGTERM before all ranks had met." in told[0]
    assert "error" not in told[1]


def test_an_interrupt_of_a_rank_that_waits_is_told_by_the_others() -> None:
    ranks = start(PATIENT, "127.0.0.1", **HOSTS)
    until_it_waits(ranks[1])
    ranks[1].send_signal(signal.SIGINT)
    told = told_by(ranks)
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert f"error: on the host {socket.gethostname()}, rank 1: interrupted." in told[0]
    assert told[1] == ""


def test_the_loss_of_the_host_they_meet_on_is_told_by_the_others() -> None:
    ranks = start(PATIENT, "127.0.0.1", **HOSTS)
    until_it_waits(ranks[1])
    ranks[0].kill()
    _, error = told_by(ranks)
    assert ranks[1].returncode == 1
    assert error.startswith("error: rank 1: the place where the ranks meet was gone before all had come (RANK=1, ")


def test_where_the_store_of_torchrun_is_gone_nobody_waits_long() -> None:
    for error in told_by(start(PATIENT, "127.0.0.1", **HOSTS, TORCHELASTIC_USE_AGENT_STORE="True")):
        assert "not all ranks came within 5 seconds" in error and "127.0.0.1 cannot be reached ([Errno 111]" in error


def test_a_port_that_is_taken_is_told_by_the_rank_that_opens_it() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        ranks = start(PATIENT, "127.0.0.1", **HOSTS, MASTER_PORT=(port := str(taken.getsockname()[1])))
        _, error = ranks[0].communicate(timeout=DEADLINE)
    for rank in ranks:
        rank.kill()
        rank.wait()
    assert error.startswith(f"error: MASTER_PORT={port} cannot be opened (") and error.count("\n") == 1


def test_what_an_earlier_start_said_at_the_place_means_nothing_to_a_later_one() -> None:
    """torchrun's store outlives the ranks that it starts again, on each host for a reason of its own."""
    store = host_store(0)
    known = {**HOSTS, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    before = start(PATIENT, "127.0.0.1", **known)
    for rank in before:
        until_it_waits(rank)
    for rank in before:
        rank.kill()
        rank.wait()
    ranks = start(MEETING, "127.0.0.1", {"LATE": "3"}, {}, {"LATE": "1"}, **known)
    told = [rank.communicate(timeout=DEADLINE) for rank in ranks]
    assert told == [("met\n", "")] * 3


def until_it_waits(rank: subprocess.Popen[str]) -> None:
    assert rank.stderr is not None
    assert "MASTER_ADDR=127.0.0.1" in (said := rank.stderr.readline())
    assert said.endswith(": not there: rank 2\n")


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
