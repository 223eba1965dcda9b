"""Caches of token ids over small tasks made by hand, opened here or by a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mft_lightning.data import token_cache
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.lines import read_blocks
from mft_lightning.data.tasks import Task
from mft_lightning.data.token_cache import CacheSettings, Refuse, TokenCache
from mft_lightning.data.token_store import TokenStore
from mft_lightning.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "import sys; from tests.data import caches; caches.in_a_process(*sys.argv[1:])"
BLOCK = 2000  # bytes of a block in these tests, so that a small file has many


def lines(count: int, first: int = 0) -> bytes:
    """Conversations of about a hundred bytes."""
    texts = [{"prompt": f"question {n}?", "answer": f"{n} is {n * n} squared, and é is 'é'."} for n in range(count)]
    return b"".join(json.dumps(text).encode() + b"\n" for text in texts[first:])


def write(directory: Path, **files: bytes) -> Task:
    """A task directory with these files, each named without its ``.jsonl``."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / f"{name}.jsonl").write_bytes(content)
    return Task(directory.name, directory)


def cache(
    directory: Path, tokenizer: PreTrainedTokenizerBase, processes: int = 1, by_contents: bool = False, **form: Any
) -> TokenCache:
    settings = CacheSettings(directory=directory, processes=processes, by_contents=by_contents)
    return TokenCache(settings, ChatFormat(tokenizer, **form))


def opened(cache: TokenCache, task: Task, refuse: Refuse | None = None) -> TokenStore:
    return TokenStore(cache.open(task, refuse))


def rows(store: TokenStore) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), spans.tolist()) for ids, spans in map(store.row, range(len(store)))]


def kept(directory: Path, suffix: str = ".arrow") -> dict[str, bytes]:
    """The files of a cache that end so, by their path in it."""
    found = sorted(directory.rglob(f"*{suffix}"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def start(
    task: Task, directory: Path, processes: int, seconds: float = 0, program: Sequence[str] = ("-c", PROGRAM)
) -> subprocess.Popen[str]:
    """A process of its own, and a group of its own, that opens a task and waits so long after every batch.

    It prints a line for each: the word ``batch`` and the ids of the processes that encode; at the end ``whole`` and how
    many conversations there are.
    """
    words = [str(task.directory), str(directory), str(processes), str(seconds)]
    return subprocess.Popen(
        [sys.executable, *program, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def processes_of(child: subprocess.Popen[str], batches: int = 2) -> list[int]:
    """The processes that encode for a child, once it has so many batches."""
    assert child.stdout is not None
    found = [child.stdout.readline() for _ in range(batches)][-1].split()
    assert found[0] == "batch"
    return [int(word) for word in found[1:]]


def wait_until_gone(pids: list[int], seconds: float = 10) -> None:
    """Raise where one of the processes is there after so long."""
    end = time.monotonic() + seconds
    while left := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() < end, f"{left} did not end"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def in_a_process(task: str, directory: str, processes: str, seconds: str) -> None:
    """What :func:`start` starts."""

    def told(store: TokenStore) -> None:
        if len(store):
            print("batch", *(child.pid for child in multiprocessing.active_children()), flush=True)
            time.sleep(float(seconds))

    token_cache.PER_PROCESS = 1
    token_cache.read_blocks = partial(read_blocks, size=BLOCK)
    tokenizer = load_tokenizer(str(ROOT / "examples" / "model"))
    store = opened(cache(Path(directory), tokenizer, int(processes)), Task(Path(task).name, Path(task)), told)
    print("whole", len(store), flush=True)
