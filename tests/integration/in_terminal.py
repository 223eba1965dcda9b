"""``python -m mft_lightning …`` with its standard input as the terminal that Ctrl-C comes from."""

from __future__ import annotations

import fcntl
import os
import sys
import termios

from mft_lightning.cli import main

if __name__ == "__main__":
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    sys.exit(main(sys.argv[1:]))
