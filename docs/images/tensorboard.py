"""Takes the pictures of TensorBoard beside it, of a run that is there: needs Chromium.

python docs/images/tensorboard.py checkpoints/quickstart/runs
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PICTURES = {
    "custom_scalars": ("#custom_scalars&_smoothingWeight=0", "1180,740"),
    "answers": ("#text", "1180,1000"),
}


def main(directory: str) -> None:
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", directory, "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            address = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+?:\d+/", line)))
            for name, (page, size) in PICTURES.items():
                options = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=15000"]
                picture = Path(__file__).parent / f"{name}.png"
                options += [f"--window-size={size}", f"--screenshot={picture}", address + page]
                subprocess.run(["chromium", *options], check=True, capture_output=True)
        finally:
            server.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:])
