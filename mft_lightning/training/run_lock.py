"""One run at a time in an output directory."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mft_lightning.errors import UserError
from mft_lightning.screen import shown

LOCK = ".lock"


@contextmanager
def only_run_in(directory: Path, key: str = "output_dir") -> Iterator[None]:
    """Keep other runs out of ``directory`` while the block runs.

    The lock is the kernel's and the process's own: it goes with the process however that ends, and loader workers,
    which are forked and may outlive a kill for some seconds, do not hold it, as they would hold filelock's ``flock``.

    Args:
        directory: made if it is not there; what was made goes again if nothing else was put into it.
        key: what named it, for messages.

    Raises:
        UserError: another run is at work in it, or it cannot be written to.
    """
    made: list[Path] = []
    try:
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(directory / LOCK, key)
    except OSError as error:
        _remove(made)
        raise UserError(f"{key}: {directory} cannot be written ({error}).") from error
    try:
        yield
    finally:
        if _is_at(descriptor, directory / LOCK):  # else someone has removed it, and it may be another run's
            (directory / LOCK).unlink()
        os.close(descriptor)
        _remove(made)


def _locked(file: Path, key: str) -> int:
    """A descriptor that holds the lock; closing it gives the lock back."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise UserError(
                f"{key}: another run is at work in {shown(file.parent)} ({holder}). Wait for its end, or give another."
            ) from error
        if _is_at(descriptor, file):
            break
        os.close(descriptor)  # who held it has removed it in the meantime
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _remove(made: list[Path]) -> None:
    """Directories that are still empty."""
    for path in made:
        with suppress(OSError):
            path.rmdir()
