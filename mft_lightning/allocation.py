"""How the C library hands out memory to a process that allocates the same large blocks again in every step."""

from __future__ import annotations

import ctypes
import os

# of mallopt(3), in glibc's malloc.h
TRIM_THRESHOLD = -1
MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Keep large blocks for the next allocation instead of giving each back to the system when it is freed.

    The system hands out memory anew page by page, and clears it: on a CPU that takes longer than many an operation on
    it. Another C library than glibc, an allocator that is loaded in its place, and what the user has set for glibc's in
    the environment stay as they are: ``MALLOC_MMAP_MAX_=65536``, its default, gives the memory back.
    """
    asked = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and not asked:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)
