"""The processes of one run: which of them this is, how they decide together, and how they end together.

A launcher says in the environment that a process is one of several, in torchrun's words: ``RANK``, ``WORLD_SIZE``,
``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``. The launcher of this program (``training/launcher.py``) uses the
same. torch is imported when a process is one of several, not before.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

STARTED_BY = "MFT_LIGHTNING_STARTED_BY"  # the process that started this one as a further rank of its run
GRACE = 10  # seconds to tell of it, and to end, when rank 0 is gone
PATIENCE = timedelta(days=7)  # for what takes as long as it takes, like tokenising
_FAILED, _HERE = "mft_lightning/failed", "mft_lightning/here"


def is_first() -> bool:
    """Whether this is the rank that prints and writes: rank 0 of all, or the only process there is."""
    variables = os.environ
    if "RANK" in variables:
        return variables["RANK"] == "0"
    if variables.get("LOCAL_RANK", "0") != "0" or variables.get("NODE_RANK", variables.get("GROUP_RANK", "0")) != "0":
        return False
    return "LOCAL_RANK" in variables or variables.get("SLURM_PROCID", "0") == "0"


def join() -> None:
    """Meet the other ranks, where a launcher started this process as one of several.

    First of all, before anything can go wrong, so that an error of any rank is told once and ends all.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not several or not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return
    if STARTED_BY in os.environ:
        _end_with(int(os.environ[STARTED_BY]))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch warns of a rank that is gone, with C++ frames
    import torch.distributed as dist

    if not dist.is_initialized():
        if STARTED_BY in os.environ:
            _store().add(f"{_HERE}/{number()}", 1)
        dist.init_process_group(backend())


def join_when_here(started: Iterable[int]) -> Iterator[None]:
    """Wait for ranks that this first of all ranks has started, yielding all the while, and join them.

    Joining alone would wait in C++, where an interrupt is not heard.
    """
    store = _store()  # which the others hold on to until they have met
    for rank in started:
        while store.add(f"{_HERE}/{rank}", 0) == 0:
            yield
            time.sleep(0.05)
    join()


def wait_for_all(place: str) -> None:
    """Wait until every rank has come here as often as this one; rank 0 hears an interrupt meanwhile."""
    dist = _group()
    if dist is None:
        return
    store: Any = dist.distributed_c10d._get_default_store()
    times = store.add(f"{place}/{dist.get_rank()}", 1)
    if dist.get_rank() == 0:
        for rank in range(1, dist.get_world_size()):
            while store.add(f"{place}/{rank}", 0) < times:
                time.sleep(0.05)


def _store() -> Any:
    """The store that the ranks meet at, of the first of them, before they have met."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=number() == 0, wait_for_workers=False, multi_tenant=True)


def leave() -> None:
    """Part from the other ranks; from then on this process is alone."""
    dist = _group()
    if dist is not None:
        dist.destroy_process_group()


def backend() -> str:
    """gloo for what is in host memory, NCCL for what is on a GPU (not yet run on a GPU)."""
    import torch

    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def end() -> None:
    """The work of a rank is done that another one started."""
    if STARTED_BY in os.environ:
        leave()


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


@contextmanager
def first_before_others(what: str) -> Iterator[None]:
    """Rank 0 does it first; the others, who started with it, wait and find it done.

    A rank that rank 0 started itself need not wait: that was afterwards.
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
        store.wait([what], PATIENCE)
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
    except dist.DistError:  # the store went with rank 0, which tells of its errors, unless it was killed
        return STARTED_BY in os.environ and os.environ["LOCAL_RANK"] == "1"


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is gone."""
    dist = _group()
    if dist is None:
        return False
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


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
