"""Paths that users give: expanded, and refused where nothing can be."""

from __future__ import annotations

from pathlib import Path

from mft_lightning.aside import aside_of
from mft_lightning.errors import UserError, first_line, nearest


def given_path(given: str | Path, key: str) -> Path:
    """A path with the home directory in the place of ``~``; nothing need be there.

    Args:
        given: the path.
        key: what named it, for messages.

    Raises:
        UserError: nobody has that home directory, or nothing could be at that path.
    """
    try:
        path = Path(given).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key} {given}: nobody has that home directory. Write it out.") from error
    _check(path, f"{key} {given}")
    return path


def given_file(given: str | Path, key: str) -> Path:
    """The same, of a file to write aside: a regular one is there, or nothing.

    A link is refused, for what is written aside and renamed would take its place.

    Raises:
        UserError: also where a link, a directory, a pipe or a device is there.
    """
    path = given_path(given, key)
    if path.is_symlink():
        raise UserError(f"{key} {given}: is a link, which would be replaced. Give the file itself.")
    if path.is_dir():
        raise UserError(f"{key} {given}: is a directory. Give a file to write.")
    if path.exists() and not path.is_file():
        raise UserError(f"{key} {given}: is no regular file. Give one, or the name of a new one.")
    _check(aside_of(path), f"{key} {given}")
    return path


def nearest_beside(path: str | Path) -> str:
    """A sentence with what stands at a path that is spelt most alike; empty where nothing is, or there is no such."""
    path = Path(path)
    try:
        return nearest(str(path), [str(path.parent / other.name) for other in path.parent.iterdir()], 0.8)
    except (OSError, ValueError):  # a directory that is not there, or a NUL
        return ""


def _check(path: Path, where: str) -> None:
    """Refuse what no file system takes, and what may not be looked at."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{where}: cannot be used ({error.strerror}). Give another path.") from error
    except ValueError as error:  # a NUL
        raise UserError(f"{where}: cannot be used ({first_line(error)}). Give another path.") from error
