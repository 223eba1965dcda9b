"""Which data files are encoded, and on which host; ``trainer.callbacks`` brings it into a run, before its data."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import lightning as L

from mft_lightning.data.token_cache import TokenCache


class Encodings(L.Callback):
    """Writes a line for every file that a process of the run encodes from now on.

    Args:
        file: where to.
    """

    def __init__(self, file: str) -> None:
        self.file, self.encode = Path(file), TokenCache._encode
        TokenCache._encode = lambda *given: self._told(*given)

    def _told(self, cache: TokenCache, task: Any, directory: Path, missing: dict[Path, Path], *rest: Any) -> None:
        with self.file.open("a") as handle:
            handle.writelines(f"{socket.gethostname()} {file.parent.name}/{file.name}\n" for file in missing)
        self.encode(cache, task, directory, missing, *rest)
