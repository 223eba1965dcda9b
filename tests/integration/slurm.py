"""A SLURM of its own for a test: munged, slurmctld and one slurmd for each of two nodes, all on this machine.

Needs root and Debian's packages (``apt-get install --no-install-recommends slurmctld slurmd slurm-client munge``).
Nothing is written outside of one directory, and nothing that runs already is touched: ports are free ones, munge's
socket and key are its own, and every process is ended by its id.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

PROGRAMS = ("unshare", "hostname", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue", "scontrol")
SOON = 30.0  # seconds for a daemon to be there, or to end

# What a node's processes see: a host name and names of their own, so that the first node is found as on a cluster.
HOSTS = "127.0.0.1 localhost\n127.0.0.11 n1\n127.0.0.12 n2\n"
AS_NODE = 'hostname "$1" && mount --bind "$2/hosts" /etc/hosts && exec slurmd -D -N "$1" -f "$2/slurm.conf"'

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SchedulerParameters=sched_interval=1
SchedulerType=sched/builtin
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdSpoolDir={root}/spool.%n
SlurmdPidFile={root}/slurmd.%n.pid
SlurmdLogFile={root}/slurmd.%n.log
NodeName=n1 NodeAddr=127.0.0.11 Port={ports[1]} CPUs=2 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeAddr=127.0.0.12 Port={ports[2]} CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def running_slurm(root: Path) -> Iterator[dict[str, str]]:
    """A SLURM of two nodes in a directory; the environment variables with which its commands talk to it."""
    root.chmod(0o755)  # munged refuses a socket in a directory that others cannot enter
    for name in ("state", "spool.n1", "spool.n2"):
        (root / name).mkdir()
    (root / "slurm.conf").write_text(CONFIGURATION.format(root=root, ports=_free_ports(3)))
    (root / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (root / "hosts").write_text(HOSTS)
    (root / "munge.key").touch(0o400)
    (root / "munge.key").write_bytes(os.urandom(128))
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    # Both nodes are at addresses of this machine's loopback interface, which gloo takes for a mistake.
    environment = {**outer, "SLURM_CONF": f"{root}/slurm.conf", "GLOO_SOCKET_IFNAME": "lo"}
    with ExitStack() as stack:
        log = stack.enter_context((root / "daemons.log").open("ab"))

        def start(*command: str) -> None:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            stack.callback(_end, process)

        def wait_for(there: Callable[[], bool]) -> None:
            deadline = time.monotonic() + SOON
            while not there():
                assert time.monotonic() < deadline, (root / "daemons.log").read_text()
                time.sleep(0.1)

        munge = [f"--{what}-file={root}/munge.{what}" for what in ("key", "log", "pid", "seed")]
        start("munged", "--foreground", "--force", f"--socket={root}/munge.socket", "--num-threads=2", *munge)
        wait_for((root / "munge.socket").exists)
        stack.callback(_end_jobs, root)
        start("slurmctld", "-D", "-i", "-c", "-f", environment["SLURM_CONF"])
        for node in ("n1", "n2"):
            start("unshare", "--mount", "--uts", "sh", "-c", AS_NODE, "sh", node, str(root))
        wait_for(lambda: _states(environment) == ["idle", "idle"])
        yield environment


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _states(environment: dict[str, str]) -> list[str]:
    """Of the nodes."""
    command = ["sinfo", "-N", "-h", "-o", "%T"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.split()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(SOON)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_jobs(root: Path) -> None:
    """End what is left of jobs, which outlives the daemons: its environment names this configuration and a job."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            variables = environ.read_bytes()
            if f"SLURM_CONF={root}/slurm.conf".encode() in variables.split(b"\0") and b"\0SLURM_JOB_ID=" in variables:
                os.kill(int(environ.parent.name), signal.SIGKILL)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of commands to a SLURM of two nodes on this machine."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"SLURM's daemons need root, and these programs that are missing: {', '.join(missing) or 'none'}")
    with running_slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment
