"""The token cache: every data file encoded once, into an Arrow file that all runs and ranks map into memory.

A task directory has a directory in the cache, with an Arrow file for each of its data files, named by what the file was
when it was encoded: a changed file gets a new one, the others stay. Files are written aside and renamed, under a lock
of the task, so that ranks and nodes on one file system encode once, and whoever is killed leaves nothing half-written.
Nothing is removed from the cache but what was left half-written; it can be deleted whenever no run uses it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import tokenizers
import transformers
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from mft_lightning.bars import WorkBar
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.encoding import encode_blocks
from mft_lightning.data.lines import Block, read_blocks
from mft_lightning.data.plain_texts import PlainTexts
from mft_lightning.data.task_files import find_files
from mft_lightning.data.tasks import Task
from mft_lightning.data.token_store import DamagedFile, EncodedFile, TokenStore, schema, unwritable, write_batches
from mft_lightning.errors import UserError

VERSION = 3  # of what a cache file holds and how it is encoded; raise it where either changes
PER_PROCESS = 4 << 20  # bytes of text that are worth a process of their own
ABANDONED = 600  # seconds after which a half-written file that nobody writes to is removed
LONGEST_NAME = 40  # letters of a task's name that its directory shows: four bytes each, of the 255 of a file name
PATIENCE = 5  # seconds of waiting for another process before it is told
Refuse = Callable[[TokenStore], None]


def default_cache_dir() -> Path:
    """In the user's cache: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mft_lightning" / "tokens"


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Where and how files are encoded.

    Args:
        directory: of the cache.
        processes: that encode.
        by_contents: tell files apart by a digest of their bytes, not by size and time of change.
    """

    directory: Path
    processes: int
    by_contents: bool = False


class TokenCache:
    """Encoded files of task directories, made where they are missing."""

    def __init__(self, settings: CacheSettings, chat_format: ChatFormat) -> None:
        self.settings, self.chat_format = settings, chat_format
        texts = chat_format.encode_texts
        self._portable = isinstance(texts, PlainTexts)  # else only this process can encode
        vocabulary = chat_format.tokenizer.get_vocab()
        self._id_type = "uint16" if max(vocabulary.values()) < 1 << 16 else "uint32"
        self._encoding = _digest(
            VERSION,
            tokenizers.__version__,
            texts.serialized if isinstance(texts, PlainTexts) else _saved(chat_format.tokenizer),
            type(chat_format.tokenizer).__qualname__,
            chat_format.eos_token_id,
            chat_format.pretrain,
            chat_format.normalize_punctuation,
        )

    def open(self, task: Task, refuse: Refuse | None = None) -> list[EncodedFile]:
        """The encoded files of a task, by name; those that are missing are made first.

        Args:
            task: a task directory.
            refuse: looks at every batch of records as it is made, and stops the work by raising.

        Raises:
            UserError: a file cannot be read, changes meanwhile, or the cache cannot be written; what ``refuse`` raises.
        """
        files = find_files(task).data
        source = _digest(str(task.directory.resolve()), self._encoding)
        directory = self.settings.directory / f"{task.name[:LONGEST_NAME]}-{source}"
        paths = self._paths(directory, files)
        if not all(path.is_file() for path in paths.values()):
            with _locked(directory, task.name):
                paths = self._paths(directory, files)  # as they are now: the lock may have taken long
                missing = {file: path for file, path in paths.items() if not path.is_file()}
                self._encode(task, directory, missing, refuse)
        _remove_abandoned(directory)
        try:
            return [EncodedFile.open(path, file) for file, path in paths.items()]
        except DamagedFile as error:
            raise UserError(f"data.cache_dir: a file of the token cache is damaged ({error}). Delete it.") from error
        except OSError as error:
            remedy = "Give another directory, or one that this user can read."
            if error.errno in (errno.EMFILE, errno.ENFILE):
                remedy = "Every data file is held open: raise the limit (ulimit -n), or join files into larger ones."
            raise UserError(
                f"data.cache_dir: {error.filename or directory} cannot be read ({error.strerror}). {remedy}"
            ) from error

    def _paths(self, directory: Path, files: list[Path]) -> dict[Path, Path]:
        """Where the encoded form of each file lies, or is to lie."""
        return {file: directory / f"{self._fingerprint(file)}.arrow" for file in files}

    def _fingerprint(self, file: Path) -> str:
        """What tells a file from what it was before."""
        try:
            if self.settings.by_contents:
                with file.open("rb") as handle:
                    return _digest(file.name, hashlib.file_digest(handle, "sha256").hexdigest())
            status = file.stat()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}). Give a file that can.") from error
        return _digest(file.name, status.st_size, status.st_mtime_ns)

    def _encode(self, task: Task, directory: Path, missing: dict[Path, Path], refuse: Refuse | None) -> None:
        sizes = {file: file.stat().st_size if file.exists() else 0 for file in missing}  # what is gone is told below
        total = sum(sizes.values())
        processes = max(1, min(self.settings.processes, total // PER_PROCESS)) if self._portable else 1
        blocks = (block for file in missing for block in chain([Block(file, 1, b"", 0)], read_blocks(file)))
        encoded = encode_blocks(blocks, self.chat_format.encoder, self._id_type, processes, _aside(directory))
        done = 0
        with WorkBar(f"tokenising {task.name}", total, "conversations") as bar, closing(encoded):
            by_file = groupby(encoded, key=lambda pair: pair[0].file)
            for (file, path), (_, pairs) in zip(missing.items(), by_file, strict=True):
                aside = _aside(directory)
                write_batches(aside, schema(self._id_type), _watched(pairs, refuse, bar, done))
                try:
                    if path.stem != self._fingerprint(file):
                        raise UserError(f"{file}: was changed while it was read. Start again when it is whole.")
                    aside.replace(path)
                except OSError as error:
                    raise unwritable(path.parent, error) from error
                finally:
                    aside.unlink(missing_ok=True)
                done += sizes[file]


def _watched(
    pairs: Iterator[tuple[Block, pa.RecordBatch]], refuse: Refuse | None, bar: WorkBar, done: int
) -> Iterator[pa.RecordBatch]:
    """The batches, each looked at by ``refuse`` and counted by ``bar``, on which ``done`` bytes came before."""
    for block, batch in pairs:
        if refuse is not None:
            refuse(TokenStore([EncodedFile(block.file, [batch])]))
        bar.reach(done + block.position, len(batch))
        yield batch


def _aside(directory: Path) -> Path:
    """A name for what is removed or renamed when it is done; what is left of it is removed later."""
    return directory / f"{uuid4().hex}.partial"


@contextmanager
def _locked(directory: Path, task: str) -> Iterator[None]:
    """The task's directory in the cache, which no other process writes to meanwhile."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock")
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            print(f"waiting for another process that tokenises {task} ({lock.lock_file})", file=sys.stderr, flush=True)
            lock.acquire()
    except OSError as error:
        raise unwritable(directory, error) from error
    try:
        yield
    finally:
        lock.release()


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed processes left. Others may do so at the same time, and a cache can be read-only."""
    with suppress(OSError):
        for aside in directory.glob("*.partial"):
            if time.time() - aside.stat().st_mtime > ABANDONED:
                aside.unlink()


def _saved(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    """All that decides what a tokenizer written in Python does: the files it saves, and the library's version."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
        return [transformers.__version__, *((file.name, file.read_bytes().hex()) for file in files)]


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
