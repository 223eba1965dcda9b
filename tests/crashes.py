"""Ends a piece of work right before each of its changes of files, one after the other, as a kill would."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate")  # audit events of Python
CUT, DONE = 77, 0


def ended_before_change(number: int, work: Callable[[], object]) -> bool:
    """Do ``work`` in a process that ends, without any clean-up, right before its ``number``-th change of a file.

    Returns:
        Whether it was ended; False where the work has no more changes than ``number``.
    """
    child = os.fork()
    if child == 0:
        _die_before(number)
        try:
            work()
        except BaseException as error:  # told by the exit code
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(DONE)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (CUT, DONE), code
    return code == CUT


def _die_before(number: int) -> None:
    seen = 0

    def look(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            if seen == number:
                os._exit(CUT)
            seen += 1

    sys.addaudithook(look)
