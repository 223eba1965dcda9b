"""Imported by the process that the loaders' processes of a rank are forked from, and by nothing else.

It loads what they need, once, and leaves signals to its parent as they do: without it no validation could start after
the signal that ends a run.
"""

import signal

import mft_lightning.data.loader  # noqa: F401
from mft_lightning.data.workers import ENDING_A_RUN

for _signum in ENDING_A_RUN:
    signal.signal(_signum, signal.SIG_IGN)
