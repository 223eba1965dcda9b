"""Commands of the program one after the other in the same processes, which saves most of the tests' time.

    torchrun --nproc-per-node 2 tests/integration/in_series.py commands.json

The file holds a list of command lines; the first that fails ends the series with its exit code.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from mft_lightning.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in json.loads(Path(sys.argv[1]).read_text()):
        if code := main(line):
            sys.exit(code)
