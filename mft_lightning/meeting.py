"""Where the ranks of a run find each other: a store that rank 0 or its launcher hosts, until all are there.

All of it waits in Python, where an interrupt is heard; torch would wait in C++.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mft_lightning.errors import UserError

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher says, all of it
HERE = "127.0.0.1"
SILENCE = 30  # seconds of waiting for ranks that others start, before it is said
MEETING = 1800  # seconds until all ranks must be there, as long as torch waits in a collective
_COME, _HIDDEN = "mft_lightning/come", "mft_lightning/hidden"


def hosted_by_launcher() -> bool:
    """Whether the store is torchrun's own, on the first host; else it is rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def host_store(port: int) -> Any:
    """The store that ranks meet at, in this process, at all addresses of this host.

    Args:
        port: 0 for any that is free (``store.port``).
    """
    from torch.distributed import TCPStore
    from torch.distributed.constants import default_pg_timeout

    # Not by MASTER_ADDR: where that is not this host, torch would look for itself there, half an hour without a word.
    return TCPStore(HERE, port, is_master=True, wait_for_workers=False, timeout=default_pg_timeout)


def meet(store: Any, meanwhile: Callable[[], None] | None) -> Any:
    """Wait for all ranks; the store they meet at.

    Args:
        store: it, if this rank hosts it already.
        meanwhile: called again and again; may raise.

    Raises:
        UserError: they did not come, or could not talk to each other.
    """
    look = _Waiting(meanwhile)
    if store is None:
        store = _find_store(look)
    if several_hosts() and "GLOO_SOCKET_IFNAME" not in os.environ and ipaddress.ip_address(_own_address()).is_loopback:
        store.set(_HIDDEN, f"{socket.gethostname()} stands for {_own_address()}")
    store.add(_COME, 1)
    while store.add(_COME, 0) < int(os.environ["WORLD_SIZE"]):
        look()
        time.sleep(0.05)
    if store.check([_HIDDEN]):
        if os.environ["LOCAL_RANK"] != "0":  # told once on each host
            raise SystemExit(1)
        raise UserError(
            f"the name of the host {store.get(_HIDDEN).decode()} on it, where no other host finds it. Set "
            "GLOO_SOCKET_IFNAME to the network interface that leads to the other hosts (like eth0), or mend /etc/hosts."
        )
    return store


def several_hosts() -> bool:
    """Whether the launcher tells of ranks on other hosts."""
    world = os.environ["WORLD_SIZE"]
    return int(world) > int(os.environ.get("LOCAL_WORLD_SIZE", world))


def _find_store(look: Callable[[str], None]) -> Any:
    """The store of a launcher's ranks: its own, or that of rank 0."""
    from torch.distributed import TCPStore
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
            return TCPStore(address, port, is_master=False, timeout=default_pg_timeout)


class _Waiting:
    """Says once that this rank waits for others that it did not start, and ends it at last."""

    def __init__(self, meanwhile: Callable[[], None] | None) -> None:
        self.meanwhile = meanwhile
        self.since, self.said = time.monotonic(), meanwhile is not None and not several_hosts()

    def __call__(self, why: str = "") -> None:
        if self.meanwhile is not None:
            self.meanwhile()
        waited = time.monotonic() - self.since
        told = ", ".join(f"{name}={os.environ[name]}" for name in LAUNCHED)
        if waited > MEETING:
            raise UserError(f"not all ranks came within {MEETING // 60} minutes ({told}){why}.")
        if waited > SILENCE and not self.said:
            line = f"waiting for the other ranks that the environment tells of ({told}){why}"
            print(line, file=sys.stderr, flush=True)
            self.said = True


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
