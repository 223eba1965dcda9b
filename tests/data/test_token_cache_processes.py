"""Many processes and one cache: they agree, wait for each other, and leave nothing that misleads when killed."""

import json
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from mft_lightning.data import encoding, token_cache
from mft_lightning.data.lines import read_blocks
from mft_lightning.data.tasks import Task
from mft_lightning.data.token_store import TokenStore
from mft_lightning.errors import UserError
from tests.data.caches import BLOCK, cache, kept, lines, opened, processes_of, rows, start, wait_until_gone, write

COUNT = 600  # conversations in some 30 blocks


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return write(tmp_path / "squares", a=lines(COUNT // 2), b=lines(COUNT, COUNT // 2))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small files are work for several processes."""
    monkeypatch.setattr(token_cache, "PER_PROCESS", 1)
    monkeypatch.setattr(token_cache, "read_blocks", partial(read_blocks, size=BLOCK))


def left_half_written(directory: Path) -> list[str]:
    return list(kept(directory, ".partial"))


@pytest.mark.usefixtures("small_blocks")
def test_several_processes_write_what_one_writes_byte_by_byte(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    bad = b'{"prompt": 1}\n\nno json\n'
    task = write(tmp_path / "mixed", a=lines(200), b=bad + lines(100), c=b"", d=lines(300, 100) + bad)
    alone, together = tmp_path / "alone", tmp_path / "together"
    first = rows(opened(cache(alone, small_tokenizer), task))
    assert rows(opened(cache(together, small_tokenizer, processes=2), task)) == first
    assert kept(together) == kept(alone) and len(kept(alone)) == 4
    assert active_children() == []


def test_two_processes_that_start_at_once_encode_once_and_both_have_it(task: Task, tmp_path: Path) -> None:
    children = [start(task, tmp_path / "cache", 1) for _ in range(2)]
    said = [child.communicate(timeout=60)[0].splitlines() for child in children]
    assert [words[-1] for words in said] == [f"whole {COUNT}"] * 2
    assert sorted(bool(words[:-1]) for words in said) == [False, True]
    assert len(kept(tmp_path / "cache")) == 2 and not left_half_written(tmp_path / "cache")


def test_who_waits_for_another_process_says_so_and_goes_on_when_that_one_is_killed(
    small_tokenizer: PreTrainedTokenizerBase,
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(token_cache, "PATIENCE", 0.1)
    child = start(task, tmp_path / "cache", 1, 60)
    processes_of(child, 1)
    real = token_cache.FileLock.acquire

    def acquire(lock: Any, **settings: Any) -> Any:
        if not settings:  # it has lost its patience
            child.kill()
        return real(lock, **settings)

    monkeypatch.setattr(token_cache.FileLock, "acquire", acquire)
    assert len(opened(cache(tmp_path / "cache", small_tokenizer), task)) == COUNT
    child.communicate()
    assert "waiting for another process that tokenises squares" in capsys.readouterr().err


def test_a_killed_process_leaves_nothing_that_is_taken_for_whole_and_no_process_behind(
    small_tokenizer: PreTrainedTokenizerBase, task: Task, tmp_path: Path
) -> None:
    child = start(task, tmp_path / "cache", 2, 0.3)
    pids = processes_of(child)
    assert len(pids) == 2
    child.kill()
    child.communicate()
    wait_until_gone(pids)
    assert kept(tmp_path / "cache") == {}
    assert len(left_half_written(tmp_path / "cache")) == 2  # the file, and what its processes are told
    whole = rows(opened(cache(tmp_path / "cache", small_tokenizer), task))
    assert whole == rows(opened(cache(tmp_path / "other", small_tokenizer), task)) and len(whole) == COUNT


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "terminated"])
def test_a_process_that_is_asked_to_end_does_so_at_once_and_takes_the_others_with_it(
    task: Task, tmp_path: Path, sent: signal.Signals
) -> None:
    child = start(task, tmp_path / "cache", 2, 1.0)  # all of it would take 15 seconds
    pids = processes_of(child)
    asked = time.monotonic()
    os.killpg(child.pid, sent) if sent == signal.SIGINT else child.send_signal(sent)  # Ctrl-C goes to all of them
    _, errors = child.communicate(timeout=20)
    assert time.monotonic() - asked < 12  # at once, on a busy machine
    wait_until_gone(pids)
    assert child.returncode == -sent and kept(tmp_path / "cache") == {}
    assert errors.count("KeyboardInterrupt") == (sent == signal.SIGINT)
    assert bool(left_half_written(tmp_path / "cache")) is (sent == signal.SIGTERM)


@pytest.mark.usefixtures("small_blocks")
def test_an_encoding_process_that_is_killed_is_told_and_nothing_hangs(
    small_tokenizer: PreTrainedTokenizerBase, task: Task, tmp_path: Path
) -> None:
    pids: list[int] = []

    def kill(store: TokenStore) -> None:
        if len(store) and not pids:
            pids.extend(child.pid for child in active_children() if child.pid)
            os.kill(pids[0], signal.SIGKILL)

    with pytest.raises(UserError, match=r"data\.preprocessing_num_workers: a process .* Give fewer than 2\."):
        opened(cache(tmp_path / "cache", small_tokenizer, processes=2), task, kill)
    wait_until_gone(pids)
    assert kept(tmp_path / "cache") == {} and not left_half_written(tmp_path / "cache")
    assert len(opened(cache(tmp_path / "cache", small_tokenizer), task)) == COUNT


UNGUARDED = """
import sys
from tests.data import caches
print(__name__)
caches.in_a_process(*sys.argv[1:])
"""


def test_a_script_that_does_not_ask_for_its_name_runs_once(task: Task, tmp_path: Path) -> None:
    """As a user's script that trains from Python may; processes that import it would run it again."""
    (tmp_path / "script.py").write_text(UNGUARDED)
    child = start(task, tmp_path / "cache", 2, program=(str(tmp_path / "script.py"),))
    said, errors = child.communicate(timeout=60)
    assert errors == "" and [said.count("main"), said.count("whole")] == [1, 1]
    assert len(kept(tmp_path / "cache")) == 2 and max(len(line.split()) for line in said.splitlines()) == 3


@pytest.mark.usefixtures("small_blocks")
def test_a_process_that_cannot_be_started_is_told_as_what_it_is(
    small_tokenizer: PreTrainedTokenizerBase, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(encoding.ProcessPoolExecutor, "submit", submit)
    with pytest.raises(UserError, match=r"data\.preprocessing_num_workers: .* \(Resource temporarily unavailable\)"):
        opened(cache(tmp_path / "cache", small_tokenizer, processes=2), task)


@pytest.mark.usefixtures("small_blocks")
def test_a_refusal_ends_the_other_processes_at_once(
    small_tokenizer: PreTrainedTokenizerBase, task: Task, tmp_path: Path
) -> None:
    seen: list[int] = []

    def refuse(store: TokenStore) -> None:
        seen.append(len(store))
        if len(store):
            raise UserError("enough")

    with pytest.raises(UserError, match="enough"):
        opened(cache(tmp_path / "cache", small_tokenizer, processes=2), task, refuse)
    assert len(seen) <= 2 and active_children() == []
    assert kept(tmp_path / "cache") == {} and not left_half_written(tmp_path / "cache")


def test_files_are_read_ahead_by_a_few_blocks_only(small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = write(tmp_path / "long", a=lines(2000)).directory / "a.jsonl"
    read: list[int] = []

    def blocks() -> Iterator[Any]:
        for block in read_blocks(file, BLOCK):
            read.append(block.first)
            yield block

    encoder = cache(tmp_path / "cache", small_tokenizer).chat_format.encoder
    ahead = []
    encoded = encoding.encode_blocks(blocks(), encoder, "uint16", 2, tmp_path / "told")
    for done, (_, batch) in enumerate(encoded, start=1):
        assert json.loads(file.open().readline())["prompt"] == "question 0?" and len(batch)
        ahead.append(len(read) - done)
    assert len(read) > 50 and 0 < max(ahead) <= 2 * encoding.WAITING
