"""``python -m mft_lightning …`` with its standard input as the terminal that Ctrl-C comes from.

A token takes as long here as of a larger model, so that an answer can be stopped before it has ended by itself.
"""

from __future__ import annotations

import fcntl
import os
import sys
import termios
import time
from typing import Any

from mft_lightning.cli import main
from mft_lightning.model import replying

SECONDS = 0.03  # a token


class Slow(replying._Stopped):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(SECONDS)
        return super().__call__(*args, **kwargs)


if __name__ == "__main__":
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    replying._Stopped = Slow  # type: ignore[misc]
    sys.exit(main(sys.argv[1:]))
