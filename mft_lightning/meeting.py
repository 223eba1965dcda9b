"""Where the ranks of a run find each other: a store that rank 0 or its launcher hosts, until all are there.

All of it waits in Python, where an interrupt is heard; torch would wait in C++. A rank that cannot meet the others says
so in the store, and all end.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from mft_lightning.errors import UserError, first_line

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher says, all of it
HERE = "127.0.0.1"
SILENCE = 30  # seconds of waiting for ranks that others start, before it is said
MEETING = 1800  # seconds until all ranks must be there, as long as torch waits in a collective
HEARD = 10  # seconds in which a rank can say why it cannot meet the others, and in which all hear it, before all end
_COME, _FAILED = "mft_lightning/come", "mft_lightning/failed_to_meet"


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
    """Wait for all ranks; the store they meet at.

    Args:
        store: it, if this rank hosts it already.
        meanwhile: called again and again; may raise.
        sigterms: those that have come.

    Raises:
        UserError: they did not come, or could not talk to each other.
    """
    from torch.distributed import DistError

    look = _Waiting(store, meanwhile, sigterms)
    try:
        if store is None:
            look.store = store = _find_store(look)
        if several_hosts() and (why := _out_of_reach()):
            look.tell(why)
            look()
        store.set(f"{_COME}/{os.environ['RANK']}", "")
        store.add(_COME, 1)
        while store.add(_COME, 0) < int(os.environ["WORLD_SIZE"]):
            look()
            time.sleep(0.05)
        return store
    except DistError:
        _end(f"the place where the ranks meet was gone before all had come ({_told()}). The first host tells why.")
    except (UserError, KeyboardInterrupt) as error:
        look.tell(str(error) or "interrupted.")
        raise


def several_hosts() -> bool:
    """Whether the launcher tells of ranks on other hosts."""
    world = os.environ["WORLD_SIZE"]
    return int(world) > int(os.environ.get("LOCAL_WORLD_SIZE", world))


def _find_store(look: Callable[[str], None]) -> Any:
    """The store of a launcher's ranks: its own, or that of rank 0."""
    from torch.distributed import PrefixStore, TCPStore
    from torch.distributed.constants import default_pg_timeout

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ["RANK"] == "0" and not hosted_by_launcher():
        return host_store(port)
    while True:
        try:
            socket.create_connection((address, port), timeout=2).close()
        except OSError as error:
            look(f": {address} cannot be reached ({error})")
            time.sleep(0.2)
        else:
            store: Any = TCPStore(address, port, is_master=False, timeout=default_pg_timeout)
            if hosted_by_launcher():  # it keeps what was said before torchrun started its ranks again
                store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            return store


class _Waiting:
    """Says once that this rank waits for others that it did not start, and ends it at last, or when one has failed."""

    def __init__(self, store: Any, meanwhile: Callable[[], None] | None, sigterms: Sequence[int]) -> None:
        self.store, self.meanwhile, self.sigterms = store, meanwhile, sigterms
        self.since, self.said = time.monotonic(), meanwhile is not None and not several_hosts()

    def __call__(self, why: str = "") -> None:
        if self.meanwhile is not None:
            self.meanwhile()
        waited = time.monotonic() - self.since
        if self.sigterms and (self.store is not None or waited > HEARD):
            self.tell("ended by SIGTERM before all ranks had met. What happened is told there.")
            raise SystemExit(1)
        if self.store is not None and self.store.check([_FAILED]):
            why_not = self.store.get(_FAILED).decode()
            time.sleep(HEARD)
            _end(why_not)
        # torchrun's store is there before its ranks are; where it is not, the first host has ended already.
        enough = SILENCE if self.store is None and hosted_by_launcher() else MEETING
        if waited > enough:
            raise UserError(f"not all ranks came within {enough} seconds ({_told()}){why or self._absent()}.")
        if waited > SILENCE and not self.said:
            line = f"waiting for the other ranks that the environment tells of ({_told()}){why or self._absent()}"
            print(line, file=sys.stderr, flush=True)
            self.said = True

    def tell(self, why: str) -> None:
        """Let all ranks that look at the store end with why this one cannot meet them; the first to tell is heard."""
        from torch.distributed import DistError

        if self.store is not None:
            with suppress(DistError):  # it is gone
                here = f"on the host {socket.gethostname()}, rank {os.environ['RANK']}"
                self.store.compare_set(_FAILED, "", f"{here}: {why}")

    def _absent(self) -> str:
        ranks = map(str, range(int(os.environ["WORLD_SIZE"])))
        return f": not there: rank {', '.join(rank for rank in ranks if not self.store.check([f'{_COME}/{rank}']))}"


def _told() -> str:
    return ", ".join(f"{name}={os.environ[name]}" for name in LAUNCHED)


def _end(why: str) -> NoReturn:
    """End this rank; it is told once on each host."""
    if os.environ["LOCAL_RANK"] != "0":
        time.sleep(1)  # torchrun ends all of a host when one has ended
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
