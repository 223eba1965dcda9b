"""Files and directories that come to be whole or not at all: written aside, synced to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".unfinished"  # ends the name of what is being written or removed; a killed process leaves it


@contextmanager
def written_aside(path: Path, *, replace_directory: bool = False) -> Iterator[Path]:
    """Where to write what is to stand at ``path``: nothing is there until the block has ended without an error.

    Args:
        path: a file, which is replaced, or a directory, which must not be there yet. Missing parents are made.
        replace_directory: a directory that is there is moved away just before, and then removed.

    Yields:
        A path beside it, on which nothing is; the block makes a file or a directory there.

    Raises:
        OSError: it cannot be written, synced or renamed. ``path`` is as it was, and nothing is left beside it
            or of parents that were not there.
    """
    missing = [parent for parent in path.parents if not parent.exists()]  # the innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    _remove(aside)
    try:
        yield aside
        _sync_tree(aside)
        if replace_directory and path.is_dir():
            remove_directory(path, meanwhile=lambda: aside.rename(path))
        else:
            aside.replace(path)
    except BaseException:
        _remove(aside)
        with suppress(OSError):  # something else is in one by now
            for parent in missing:
                parent.rmdir()
        raise
    sync(path.parent)


def remove_directory(path: Path, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Remove a directory so that a part of it never stands under its name.

    Args:
        path: the directory.
        meanwhile: done when nothing has its name any more.
    """
    aside = path.with_name(f".{path.name}.removed{UNFINISHED}")
    _remove(aside)
    path.rename(aside)
    meanwhile()
    _remove(aside)


def remove_unfinished(directory: Path, names: str = "*") -> None:
    """Remove what a killed process left in the middle of writing or removing what is called like ``names``."""
    for remains in directory.glob(f".{names}{UNFINISHED}"):
        _remove(remains)


def sync(path: Path) -> None:
    """Wait until a file's contents, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def aside_of(path: Path) -> Path:
    """Where :func:`written_aside` writes."""
    return path.with_name(f".{path.name}{UNFINISHED}")


def _sync_tree(path: Path) -> None:
    if path.is_symlink():
        return
    if path.is_dir():
        for entry in path.iterdir():
            _sync_tree(entry)
    sync(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
