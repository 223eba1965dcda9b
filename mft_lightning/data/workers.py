"""Processes that work for this one: they leave signals to it, and end with it. Nothing here imports torch."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from typing import Any

from mft_lightning import ranks

ENDING_A_RUN = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # in order; its batches are needed until then
PRELOADED = "mft_lightning.data.loader"  # what they need


def serve_parent(*left: signal.Signals) -> None:
    """Called by a process at its start: it ends when its parent is gone, even by SIGKILL.

    Args:
        left: signals that it leaves to its parent. torchrun and SLURM send them to every process there is.
    """
    for signum in left:
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True, name="end with the parent").start()


def loader_options(workers: int, *, pinned: bool = False) -> dict[str, Any]:
    """How a DataLoader starts its processes, and whether a thread of it puts batches where a GPU can fetch them.

    The process of a rank has threads that talk to other ranks. A fork of it can find a lock taken for ever by one of
    them, Python's own of thread states for one, so that workers are forked from a server without threads instead
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html, its warning).
    """
    if not workers:
        return {"num_workers": 0, "pin_memory": pinned}
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)
    context = None
    if ranks.are_several():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
        _start_fork_server()
    return {
        "num_workers": workers,
        "pin_memory": pinned,
        "worker_init_fn": _start_worker,
        "multiprocessing_context": context,
    }


def _start_fork_server() -> None:
    """The server, and what tracks its semaphores, never hear the signals that end a run, as long as their imports take.

    Without the server no validation could start after such a signal. A process keeps from its birth the mask of the
    thread that starts it; Python's own start of the tracker lifts some of it, and so comes first.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_A_RUN)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers() -> None:
    """Python's own end sends daemons SIGTERM, which these leave to this process, and would wait for them for ever.

    It comes to that where an error holds the loader, as one that a worker raised does.
    """
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _start_worker(number: int) -> None:
    serve_parent(*ENDING_A_RUN)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
