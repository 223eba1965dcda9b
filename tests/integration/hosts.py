"""Two hosts on one machine: each has a network, a name and processes of its own, and a cable lies between them.

They are made of namespaces, which have no name that others could meet, and which are gone, with all that runs in them,
when the process that made them is, however that ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT

PROGRAMS = ("unshare", "nsenter", "hostname", "mount", "ip")
ADDRESSES = {"one": "10.77.0.1", "two": "10.77.0.2"}
CABLE = "lan0"  # what each calls its end
# The first process of a host says its number, and lives until its standard input is closed.
INIT = 'read own rest < /proc/self/stat && hostname "$1" && mount --bind "$2" /etc/hosts && echo $own && exec cat'


@dataclass(frozen=True)
class Host:
    """One of the two.

    Args:
        name: by which the other finds it.
        init: the process that it lives as long as.
    """

    name: str
    init: int

    def command(self, *words: str) -> list[str]:
        """What runs ``words`` on it, in this project's root."""
        where = ("--target", str(self.init), "--net", "--uts", "--mount", "--pid", f"--wd={ROOT}")
        return ["nsenter", *where, "--", *words]

    def ip(self, words: str) -> None:
        """Change its network."""
        subprocess.run(["nsenter", "--target", str(self.init), "--net", "ip", *words.split()], check=True)

    def lose(self) -> None:
        """Kill all that runs on it; its network stays."""
        here = Path(f"/proc/{self.init}/ns/pid").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # ended in the meantime
                if process.name != str(self.init) and (process / "ns" / "pid").readlink() == here:
                    os.kill(int(process.name), signal.SIGKILL)


@contextmanager
def two_hosts(directory: Path, own: str | None = None) -> Iterator[list[Host]]:
    """Two that know each other by name.

    Args:
        directory: where files for them are written.
        own: what each takes its own name for, if not for the address at which the other finds it.
    """
    if os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)):
        pytest.skip(f"two hosts need root, and {', '.join(PROGRAMS)} (Debian's util-linux, hostname, mount, iproute2)")
    with ExitStack() as stack:
        hosts = []
        for name in ADDRESSES:
            known = {"localhost": "127.0.0.1", **ADDRESSES, **({name: own} if own else {})}
            file = directory / f"hosts.{name}"
            file.write_text("".join(f"{address} {known_as}\n" for known_as, address in known.items()))
            hosts.append(Host(name, _start(stack, name, file)))
        hosts[0].ip(f"link add {CABLE} type veth peer name {CABLE} netns {hosts[1].init}")
        for host in hosts:
            host.ip(f"address add {ADDRESSES[host.name]}/24 dev {CABLE}")
            host.ip("link set lo up")
            host.ip(f"link set {CABLE} up")
        yield hosts


def _start(stack: ExitStack, name: str, known: Path) -> int:
    """The first process of a host, which ends with the stack."""
    own = ("--fork", "--kill-child", "--pid", "--net", "--uts", "--mount")
    process = subprocess.Popen(
        ["unshare", *own, "sh", "-c", INIT, "sh", name, str(known)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stack.enter_context(process)  # closes its input, and waits for it
    assert process.stdout is not None and process.stderr is not None
    if not (said := process.stdout.readline()):
        pytest.skip(f"two hosts need namespaces: {process.stderr.read().strip()}")
    return int(said)
