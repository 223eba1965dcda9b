"""The processes of one run: which of them this is, how they decide together, and how they end together.

A launcher says in the environment that a process is one of several, in torchrun's words: ``RANK``, ``WORLD_SIZE``,
``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``. The launcher of this program (``training/launcher.py``) uses the
same, and what srun says is put into them. torch is imported when a process is one of several, not before.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from mft_lightning.errors import first_line
from mft_lightning.meeting import ELASTIC, LAUNCHED, end_all, hosted_by_launcher, meet, sigterm_noted

STARTED_BY = "MFT_LIGHTNING_STARTED_BY"  # the process that started this one as a further rank of its run
CONNECTING = 50  # seconds in which ranks that have all come must reach each other
GRACE = 10  # seconds to tell of it, and to end, when another rank failed or is gone
GO_ON = " Go on with --ckpt_path last."  # a run, after an end that is not its own fault
AFTERWARDS = {  # by command
    "fit": GO_ON,
    "predict": " What is answered is kept; the same command goes on, without --overwrite.",
}
_FAILED, _TOLD = "mft_lightning/failed", "mft_lightning/told"


class LostPeerError(RuntimeError):
    """Another rank has failed, and tells why."""


def hear_srun() -> None:
    """Say of a task that srun started with others what torchrun would say; from then on it is the same to all.

    The first rank is on the step's first node, at a port that is the step's own; ``MASTER_ADDR`` and ``MASTER_PORT``
    in the environment stand.
    """
    variables = os.environ
    if is_launched() or int(variables.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    node, tasks = variables["SLURM_NODEID"], _each(variables["SLURM_STEP_TASKS_PER_NODE"])
    first = re.sub(r"\[(\w+)[^]]*\]", r"\1", variables["SLURM_STEP_NODELIST"]).split(",")[0]  # n[07-08,11],m -> n07
    step = int(variables["SLURM_JOB_ID"]) * 4 + int(variables["SLURM_STEP_ID"])
    variables |= {
        "MASTER_ADDR": variables.get("MASTER_ADDR") or (first if len(tasks) > 1 else "127.0.0.1"),
        "MASTER_PORT": variables.get("MASTER_PORT") or str(15000 + step % 16000),  # below those given to any program
        "RANK": variables["SLURM_PROCID"],
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "WORLD_SIZE": variables["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": str(tasks[int(node)]),
        "NODE_RANK": node,
        "GROUP_RANK": node,
        ELASTIC: f"slurm-{variables['SLURM_JOB_ID']}.{variables['SLURM_STEP_ID']}",
    }


def _each(tasks: str) -> list[int]:
    """The tasks of each node, of SLURM's ``2(x3),1``."""
    return [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(times or 1))]


def is_launched() -> bool:
    """Whether a launcher started this process as a rank."""
    return all(os.environ.get(name) for name in LAUNCHED)


def is_first() -> bool:
    """Whether this is the rank that prints and writes: rank 0 of all, or the only process there is."""
    variables = os.environ
    if {"RANK", "LOCAL_RANK"} <= variables.keys():  # Lightning takes WORLD_SIZE away at the end
        return variables["RANK"] == "0"
    node = variables.get("NODE_RANK", variables.get("GROUP_RANK", "0"))
    return node == "0" and variables.get("SLURM_PROCID", "0") == "0"


def join(store: Any = None, meanwhile: Callable[[], None] | None = None) -> None:
    """Meet the other ranks, where a launcher started this process as one of several.

    First of all, before anything can go wrong, so that an error of any rank is told once and ends all.

    Args:
        store: where the ranks meet, if this one hosts it already.
        meanwhile: called again and again while this one waits; may raise.
    """
    if not is_launched() or int(os.environ["WORLD_SIZE"]) < 2:
        return
    if STARTED_BY in os.environ:
        _end_with(int(os.environ[STARTED_BY]))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch warns of a rank that is gone, with C++ frames
    with sigterm_noted() as sigterms:
        import torch.distributed as dist

        if dist.is_initialized():
            return
        store = dist.PrefixStore("ranks", meet(store, meanwhile, sigterms))
    _connect(store)


def _connect(store: Any) -> None:
    """Make the group of all ranks, which have come; one that is killed meanwhile is not waited for long.

    Raises:
        UserError: they cannot reach each other.
    """
    import torch.distributed as dist
    from torch.distributed.constants import default_pg_timeout

    own: dict[str, Any] = {"rank": number(), "world_size": int(os.environ["WORLD_SIZE"])}
    try:
        dist.init_process_group(backend(), store=store, timeout=timedelta(seconds=CONNECTING), **own)
    except (dist.DistError, RuntimeError) as error:
        end_all(
            f"the ranks had all come, but could not be connected ({first_line(error)}). One was lost, and its host "
            "tells why; or a network interface is not the one that leads to the others: set GLOO_SOCKET_IFNAME."
        )
    # no public way leads there: torch/distributed/distributed_c10d.py in 2.13
    dist.distributed_c10d._set_pg_timeout(default_pg_timeout)


def wait_for_all(place: str) -> None:
    """Wait until every rank has come here as often as this one; rank 0 hears an interrupt meanwhile.

    Raises:
        LostPeerError: another rank has failed in the meantime.
    """
    dist = _group()
    if dist is None:
        return
    store: Any = dist.distributed_c10d._get_default_store()
    times = store.add(f"{place}/{dist.get_rank()}", 1)
    if dist.get_rank() == 0:
        for rank in range(1, dist.get_world_size()):
            while store.add(f"{place}/{rank}", 0) < times:
                _raise_if_lost(store)
                time.sleep(0.05)


def _raise_if_lost(store: Any) -> None:
    if store.check([_FAILED]):
        raise LostPeerError("another rank has failed")


def leave() -> None:
    """Part from the other ranks; from then on this process is alone."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def backend() -> str:
    """gloo for what is in host memory, NCCL for what is on a GPU (not yet run on a GPU)."""
    import torch

    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def end(code: int) -> None:
    """End this process, if another rank started it: its work is done.

    Without the interpreter's own end, in which torch's threads, which talk to other ranks, aborted once in some hundred
    runs (torch 2.13, gloo).
    """
    if STARTED_BY in os.environ:
        sys.stderr.flush()
        os._exit(code)


def end_launched(code: int) -> None:
    """End this process, if a launcher started it: as :func:`end`, when nothing else is to be done in it."""
    if ELASTIC in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def are_several() -> bool:
    """Whether this process is one of several that have met."""
    return _group() is not None


def number() -> int:
    """This process's rank."""
    return int(os.environ.get("RANK", "0"))


def highest(value: int) -> int:
    """The highest of all ranks' values; every rank must ask."""
    dist = _group()
    if dist is None:
        return value
    import torch

    highest = torch.tensor(int(value))
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return int(highest)


def take_from_first(tensor: Any) -> None:
    """Give a tensor in host memory, in place, the first rank's values; every rank must ask."""
    if (dist := _group()) is not None:
        dist.broadcast(tensor, src=0)


@contextmanager
def first_before_others(what: str) -> Iterator[None]:
    """Rank 0 does it first; the others, who started with it, wait as long as it takes, and find it done.

    A rank that rank 0 started itself need not wait: that was afterwards.

    Raises:
        LostPeerError: rank 0 has failed in it.
    """
    dist = _group()
    if dist is None or STARTED_BY in os.environ:
        yield
        return
    store: Any = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        yield
        store.set(what, "")
    else:
        while not store.check([what]):
            _raise_if_lost(store)
            time.sleep(0.05)
        yield


def is_first_to_fail() -> bool:
    """Whether no other rank has told of an error yet; from now on one has.

    The other ranks fail too, because this one is gone, and have nothing of their own to tell.
    """
    dist = _group()
    if dist is None:
        return True
    try:
        store: Any = dist.distributed_c10d._get_default_store()
        return bool(store.compare_set(_FAILED, "", str(number())) == str(number()).encode())
    except dist.DistError:
        if hosted_by_launcher():  # it is gone with all of the first host: each other host has one who says so
            return os.environ["LOCAL_RANK"] == "0"
        # It went with rank 0, which tells of its errors, unless it was killed.
        return STARTED_BY in os.environ and os.environ["LOCAL_RANK"] == "1"


def told() -> None:
    """The first rank that failed has said why; now the others may end, after which launchers end all."""
    _at_store(lambda store: store.set(_TOLD, ""))


def wait_until_told() -> None:
    """Let the first rank that failed say why, unless it is gone."""
    _at_store(lambda store: store.wait([_TOLD], timedelta(seconds=GRACE)))


def _at_store(what: Callable[[Any], None]) -> None:
    """What needs the store, which goes with rank 0, or never came about."""
    dist = _group()
    if dist is None:
        return
    with suppress(dist.DistError):
        what(dist.distributed_c10d._get_default_store())


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is gone."""
    dist = _group()
    if dist is None:
        return False
    lost = isinstance(error, (dist.DistError, LostPeerError))
    return lost or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def _group() -> Any:
    """torch.distributed where this process is one of several that have met, else None."""
    dist: Any = sys.modules.get("torch.distributed")
    met = dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist if met else None


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone, even by SIGKILL."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end with the first rank").start()
