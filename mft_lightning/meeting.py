"""Where the ranks of a run find each other: a store that rank 0 or its launcher hosts, until all are there.

All of it waits in Python, where an interrupt is heard; torch would wait in C++. A rank that cannot meet the others says
so in the store, and all end.
"""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn
from uuid import uuid4

from mft_lightning.errors import UserError, first_line

BEGUN = time.monotonic()  # of this process, but for what Python needs to start
ELASTIC = "TORCHELASTIC_RUN_ID"  # by which Lightning knows torchrun's processes
PATIENCE = "MFT_LIGHTNING_MEETING"  # seconds in which all ranks must be there, of one who knows better
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher says, all of it
HERE = "127.0.0.1"
SILENCE = 30  # seconds of waiting for ranks that others start, before it is said
MEETING = 1800  # seconds until all ranks must be there where each is started by hand, as torch waits in a collective
TOGETHER = 50  # the least where a launcher starts all at once; or ten times what this one needed to come
HEARD = 10  # seconds in which a rank can say why it cannot meet the others, and in which all hear it, before all end
_FIRST, _COME, _FAILED, _OUTCOME = "mft_lightning/first", "come", "failed", "outcome"


def hosted_by_launcher() -> bool:
    """Whether the store is torchrun's own, on the first host; else it is rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def host_store(port: int) -> Any:
    """The store that ranks meet at, in this process, at all addresses of this host.

    Args:
        port: 0 for any that is free (``store.port``).

    Raises:
        UserError: the port cannot be opened.
    """
    from torch.distributed import DistNetworkError, TCPStore
    from torch.distributed.constants import default_pg_timeout

    # Not by MASTER_ADDR: where that is not this host, torch would look for itself there, half an hour without a word.
    try:
        return TCPStore(HERE, port, is_master=True, wait_for_workers=False, timeout=default_pg_timeout)
    except DistNetworkError as error:
        raise UserError(
            f"MASTER_PORT={port} cannot be opened ({first_line(error)}). Set MASTER_PORT to a free one on all hosts."
        ) from error


@contextmanager
def sigterm_noted() -> Iterator[Sequence[int]]:
    """SIGTERMs that come meanwhile, of which ranks on other hosts are to hear; they have their effect at its end.

    torchrun sends them to the neighbours of a rank that was killed, and tells other hosts nothing.
    """
    if not several_hosts():
        yield ()
        return
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: noted.append(signum))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)
        if noted:
            signal.raise_signal(signal.SIGTERM)


def meet(store: Any, meanwhile: Callable[[], None] | None, sigterms: Sequence[int] = ()) -> Any:
    """Wait for all ranks; a part of the store they meet at that is theirs alone.

    Rank 0 opens a part of a new name, in which the others say that they have come, each process by a name of its own,
    and rank 0 to which of them it says what came of it. So nothing counts that an earlier process has said or heard:
    torchrun's store outlives those that it starts again, and it does not tell each host the same number of starts.

    Args:
        store: it, if this rank hosts it already.
        meanwhile: called again and again; may raise.
        sigterms: those that have come.

    Raises:
        UserError: they did not come, or could not talk to each other.
    """
    from torch.distributed import DistError

    look = _Waiting(meanwhile, sigterms)
    try:
        if store is None:
            store = _find_store(look)
        return _await_others(store, look) if os.environ["RANK"] == "0" else _join_first(store, look)
    except DistError:
        end_all(f"the place where the ranks meet was gone before all had come ({_told()}). The first host tells why.")


def _await_others(store: Any, look: _Waiting) -> Any:
    """Rank 0's part of it."""
    from torch.distributed import PrefixStore

    name = uuid4().hex
    part, others = PrefixStore(name, store), _others()
    store.set(_FIRST, name)

    def say(why: str | None) -> None:
        processes = [part.get(key).decode() for key in others if part.check([key])]
        part.set(_OUTCOME, json.dumps({"why": why, "processes": processes}))

    try:
        while True:
            come = part.check(others)  # a rank that cannot meet the others says so first
            why = look.fault() or (part.get(_FAILED).decode() if part.check([_FAILED]) else None)
            if come or why is not None:
                break
            look(partial(_absent, part))
            time.sleep(0.05)
    except (UserError, KeyboardInterrupt) as error:
        say(_of_this_rank(str(error) or "interrupted."))
        raise
    say(why)
    if why is None:
        return part
    until = time.monotonic() + HEARD
    while time.monotonic() < until:
        time.sleep(0.5)
        say(why)  # to those who have come meanwhile
    end_all(why)


def _join_first(store: Any, look: _Waiting) -> Any:
    """All others' part of it."""
    from torch.distributed import DistError, PrefixStore

    me, name, part, come, told = uuid4().hex, b"", None, False, False
    try:
        while True:
            if store.check([_FIRST]) and store.get(_FIRST) != name:  # else that of an earlier start may have been there
                name = store.get(_FIRST)
                part, come, told = PrefixStore(name.decode(), store), False, False
            if part is not None:
                if not told and (why := look.fault()) is not None:
                    part.compare_set(_FAILED, "", why)
                    told = True
                if not come:
                    part.set(f"{_COME}/{os.environ['RANK']}", me)
                    come = True
                if part.check([_OUTCOME]) and me in (outcome := json.loads(part.get(_OUTCOME)))["processes"]:
                    if outcome["why"] is None:
                        return part
                    time.sleep(HEARD)  # as rank 0 does: a launcher ends all of a host when one has ended
                    end_all(outcome["why"])
            look(partial(_absent, part))
            time.sleep(0.05)
    except (UserError, KeyboardInterrupt) as error:
        if part is not None:
            with suppress(DistError):  # it is gone
                part.compare_set(_FAILED, "", _of_this_rank(str(error) or "interrupted."))
        raise


def _others() -> list[str]:
    """Where each rank but the first says that it has come."""
    return [f"{_COME}/{rank}" for rank in range(1, int(os.environ["WORLD_SIZE"]))]


def _absent(part: Any) -> str:
    missing = [] if part is None else [key.removeprefix(f"{_COME}/") for key in _others() if not part.check([key])]
    return f": not there: rank {', '.join(missing) or '0'}"


def _of_this_rank(why: str) -> str:
    return f"on the host {socket.gethostname()}, rank {os.environ['RANK']}: {why}"


def several_hosts() -> bool:
    """Whether the launcher tells of ranks on other hosts."""
    world = os.environ["WORLD_SIZE"]
    return int(world) > int(os.environ.get("LOCAL_WORLD_SIZE", world))


def _find_store(look: _Waiting) -> Any:
    """The store of a launcher's ranks: its own, or that of rank 0."""
    from torch.distributed import TCPStore
    from torch.distributed.constants import default_pg_timeout

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ["RANK"] == "0" and not hosted_by_launcher():
        return host_store(port)
    if hosted_by_launcher():  # there before its ranks are; where it is not, the first host has ended already
        look.most = SILENCE
    while True:
        try:
            socket.create_connection((address, port), timeout=2).close()
        except OSError as error:
            look(partial(str, f": {address} cannot be reached ({error})"))
            time.sleep(0.2)
        else:
            look.most = look.patience
            return TCPStore(address, port, is_master=False, timeout=default_pg_timeout)


def _patience() -> float:
    """How many seconds this rank waits for the others.

    torchrun and srun start all at once, and tell nobody on other hosts of one that ended before it could say so itself.

    Raises:
        UserError: ``MFT_LIGHTNING_MEETING`` is no number of seconds.
    """
    if said := os.environ.get(PATIENCE):
        if not said.isdecimal() or int(said) < 1:
            raise UserError(f"{PATIENCE}={said} is no number of seconds. Set it to one, or take it away.")
        return int(said)
    return max(TOGETHER, 10 * (time.monotonic() - BEGUN)) if ELASTIC in os.environ else MEETING


class _Waiting:
    """Says once that this rank waits for others that it did not start, and ends it at last."""

    def __init__(self, meanwhile: Callable[[], None] | None, sigterms: Sequence[int]) -> None:
        self.meanwhile, self.sigterms = meanwhile, sigterms
        self.since, self.said = time.monotonic(), meanwhile is not None and not several_hosts()
        self.most = self.patience = _patience()
        self.out_of_reach = _out_of_reach() if several_hosts() else None

    def fault(self) -> str | None:
        """Why this rank cannot meet the others, for all to hear."""
        ended = "ended by SIGTERM before all ranks had met. What happened is told there." if self.sigterms else None
        why = self.out_of_reach or ended
        return None if why is None else _of_this_rank(why)

    def __call__(self, why: Callable[[], str]) -> None:
        if self.meanwhile is not None:
            self.meanwhile()
        waited = time.monotonic() - self.since
        if self.sigterms and waited > HEARD:  # of nobody who would hear it
            raise SystemExit(1)
        if waited > self.most:
            raise UserError(
                f"not all ranks came within {self.most:.0f} seconds ({_told()}){why()}. Their hosts tell why; "
                f"where they only start slower, set {PATIENCE} to more seconds on all hosts."
            )
        if waited > SILENCE and not self.said:
            line = f"waiting for the other ranks that the environment tells of ({_told()}){why()}"
            print(line, file=sys.stderr, flush=True)
            self.said = True


def _told() -> str:
    return ", ".join(f"{name}={os.environ[name]}" for name in LAUNCHED)


def end_all(why: str) -> NoReturn:
    """End this rank, as all others do; it is told once on each host."""
    if os.environ["LOCAL_RANK"] != "0":
        time.sleep(1)  # after the one that tells
        raise SystemExit(1)
    raise UserError(why)


def _out_of_reach() -> str | None:
    """Why gloo on other hosts would not find this rank."""
    if names := os.environ.get("GLOO_SOCKET_IFNAME"):
        there = [name for _, name in socket.if_nameindex()]
        if not set(names.split(",")) <= set(there):
            return f"GLOO_SOCKET_IFNAME={names} is no network interface there. There are {', '.join(there)}."
    elif ipaddress.ip_address(address := _own_address()).is_loopback:
        return (
            f"its own name stands for {address}, where no other host finds it. Set GLOO_SOCKET_IFNAME to the "
            "network interface that leads to the other hosts (like eth0), or mend /etc/hosts."
        )
    return None


def _own_address() -> str:
    """Where other ranks are told to find this one: what its host's name stands for, if that is an address it has.

    So gloo chooses it (createDefaultDevice in
    https://github.com/pytorch/pytorch/blob/main/torch/csrc/distributed/c10d/ProcessGroupGloo.cpp).
    """
    with suppress(OSError):
        for family, *_, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family) as found:
                found.bind(address)
                return str(address[0])
    return HERE
