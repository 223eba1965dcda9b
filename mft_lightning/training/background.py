"""One piece of work at a time beside the training, whose errors are not lost."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """A thread for writing checkpoints.

    An error of the work is raised in the thread that asked for it, by whichever of these methods is called next.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Do ``work`` beside what comes next, once the work before is done."""
        self.wait()
        self._thread = threading.Thread(target=self._do, args=(work,), name="save a checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is left to do."""
        if self._thread is not None:
            self._thread.join()
        self.raise_error()

    def raise_error(self) -> None:
        """Raise what went wrong so far, once; wait for nothing."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again by `raise_error`
            self._error = error
