"""How many cores this process may keep busy."""

from __future__ import annotations

import os
from math import ceil
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """The cores that this process is bound to, and no more than a container's quota of time on them is worth."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return bound if quota is None else max(1, min(bound, ceil(quota)))


def _quota() -> float | None:
    """Cores' worth of time that the control group allows, by cgroup v2 or v1; None where there is no limit."""
    try:
        allowed, period = (CONTROL_GROUPS / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            allowed, period = (
                (CONTROL_GROUPS / "cpu" / name).read_text().strip()
                for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            )
        except OSError:  # no Linux, or no such control: then there is no limit
            return None
    if not allowed.isdigit() or not period.isdigit() or int(period) == 0:  # "max", or -1
        return None
    return int(allowed) / int(period)
