"""Commands of the program one after the other in one process; their exit codes, and what they leave behind.

python tests/integration/one_by_one.py commands.json
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from mft_lightning.cli import main

END = "--- the next\n"  # of what a command says, on both streams

if __name__ == "__main__":
    before, codes = dict(os.environ), []
    for line in json.loads(Path(sys.argv[1]).read_text()):
        codes.append(main(line))
        for stream in (sys.stdout, sys.stderr):
            print(END, end="", file=stream, flush=True)
        assert dict(os.environ) == before
        assert threading.enumerate() == [threading.main_thread()]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print("codes", *codes)
