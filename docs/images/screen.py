"""Draws what ``inspect`` prints on a terminal, as inspect.svg beside it.

python docs/images/screen.py --config configs/quickstart.yaml
"""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH, LINES = 118, 26


def main(words: list[str]) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "mft_lightning", "inspect", *words]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=environment):
        os.close(theirs)
        printed = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # how Linux tells that the other side is closed
                break
            printed += part
    picture = Console(record=True, width=WIDTH, file=io.StringIO())
    picture.print(Text.from_ansi("\n".join(printed.decode().splitlines()[:LINES])))
    drawn = picture.export_svg(title=f"python -m mft_lightning inspect {' '.join(words)}")
    drawn = re.sub(r"@font-face \{.*?\}\n", "", drawn, flags=re.DOTALL)  # which are fetched from elsewhere
    (Path(__file__).parent / "inspect.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
