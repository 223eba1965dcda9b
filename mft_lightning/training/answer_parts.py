"""Answers that are kept aside until all are there, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from mft_lightning import ranks
from mft_lightning.aside import sync, written_aside
from mft_lightning.errors import UserError
from mft_lightning.screen import shown
from mft_lightning.training.run_lock import LOCK, only_run_in

MADE_FROM = "made_from.json"


class AnswerParts:
    """Batches of answers in a directory beside the file that will hold them all: a line each, in a file of each rank.

    They count as long as what they were made from stands beside them.

    Args:
        output: the file that all answers are for.
        made_from: what decides the answers, by what a user calls it; JSON.
    """

    def __init__(self, output: Path, made_from: Mapping[str, Any]) -> None:
        self.output = output
        self.directory = output.with_name(f".{output.name}.parts")
        self.made_from = json.loads(json.dumps(made_from))

    @contextmanager
    def opened(self, *, overwrite: bool) -> Iterator[None]:
        """Find what is there, or start anew; the first rank, before the others, keeps other runs out meanwhile.

        Args:
            overwrite: start anew, whatever is there.

        Raises:
            UserError: the answers are there, or parts of others, and may not be overwritten; or another run is at work.
        """
        with only_run_in(self.directory, "--output") if ranks.is_first() else nullcontext():
            with ranks.first_before_others("answers"):
                if ranks.is_first():
                    self._prepare(overwrite)
            yield

    def _prepare(self, overwrite: bool) -> None:
        begun = not overwrite and (self.directory / MADE_FROM).is_file() and any(self._lines())
        if begun and (changed := self._changed()):
            raise UserError(
                f"--output {shown(self.output)}: some answers are there already, of another run: {'; '.join(changed)}. "
                "Set that back to go on, start anew with --overwrite, or give another --output."
            )
        if not begun:
            if self.output.exists() and not overwrite:
                raise UserError(
                    f"--output {shown(self.output)}: is there already. Ask again with --overwrite, or give another "
                    "--output."
                )
            self._disown()
            for path in self.directory.iterdir():
                if path.name != LOCK:
                    path.unlink()
            with written_aside(self.directory / MADE_FROM) as aside:
                aside.write_text(json.dumps(self.made_from, indent=2) + "\n", encoding="utf-8")

    def _changed(self) -> list[str]:
        """What decides the answers and is not as it was."""
        try:
            before = json.loads((self.directory / MADE_FROM).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{shown(self.directory)}: is damaged ({error}). Start anew with --overwrite.") from error
        keys = [key for key in {**before, **self.made_from} if before.get(key) != self.made_from.get(key)]
        return [f"{key} was {before.get(key)!r}, is {self.made_from.get(key)!r}" for key in keys]

    def read(self) -> dict[int, list[dict[str, Any]]]:
        """The answers of every batch that is whole, by its number."""
        return {found["batch"]: found["answers"] for found in self._lines()}

    def _lines(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self.directory.glob("part-*.jsonl")):
            for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
                if not line.endswith(b"\n"):  # the writer was killed in the middle of it
                    continue
                written = b"{" + line[len(_line(b"")) - 1 : -1]
                if _line(written) != line:
                    raise UserError(
                        f"{shown(path)}:{number}: is damaged: it is not as it was written. Start anew with --overwrite."
                    )
                yield json.loads(written)

    def writer(self, number: int) -> PartWriter:
        """What adds batches to the part of a rank."""
        return PartWriter(self.directory / f"part-{number:05d}.jsonl")

    def remove(self) -> None:
        """Take the parts away, when all that is in them stands in the output."""
        self._disown()
        shutil.rmtree(self.directory)

    def _disown(self) -> None:
        """Let no part count any more, so that a kill in the middle of removing them leaves none that does."""
        (self.directory / MADE_FROM).unlink(missing_ok=True)
        sync(self.directory)


class PartWriter:
    """Adds whole batches to a file, after taking away what was left of one.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._handle = path.open("ab")
        self._handle.truncate(path.read_bytes().rfind(b"\n") + 1)

    def add(self, batch: int, answers: list[dict[str, Any]]) -> None:
        """Write a batch, so that a kill of this process leaves all of it or none that counts."""
        self._handle.write(_line(json.dumps({"batch": batch, "answers": answers}).encode()))
        self._handle.flush()

    def close(self) -> None:
        """Have it on the disk."""
        self._handle.close()
        sync(Path(self._handle.name))


def _line(batch: bytes) -> bytes:
    """A line that holds a JSON object, with a checksum of it in front."""
    return b'{"crc32": "%08x", ' % zlib.crc32(batch) + batch[1:] + b"\n"
