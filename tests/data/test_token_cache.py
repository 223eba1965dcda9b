"""The cache of token ids: a file is encoded once, again when it changed, and never taken for what it is not."""

import gc
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from mft_lightning.data import token_cache, token_store
from mft_lightning.data.lines import read_blocks
from mft_lightning.data.tasks import Task
from mft_lightning.data.token_cache import ABANDONED
from mft_lightning.data.token_store import TokenStore
from mft_lightning.data.tokenizer import add_role_tokens, load_tokenizer
from mft_lightning.errors import UserError
from tests.data.caches import BLOCK, ROOT, cache, kept, lines, opened, rows, write

Tokenizer = PreTrainedTokenizerBase


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are encoded, as it happens; blocks are small."""
    names: list[str] = []

    def read(file: Path) -> Iterator[Any]:
        names.append(file.name)
        return read_blocks(file, BLOCK)

    monkeypatch.setattr(token_cache, "read_blocks", read)
    return names


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return write(tmp_path / "squares", a=lines(60), b=lines(70, 60))


def nothing_half_written(directory: Path) -> bool:
    return not kept(directory, ".partial")


# --- once, and again where a file changed


def test_what_was_encoded_once_is_read_the_next_time(
    small_tokenizer: Tokenizer, task: Task, tmp_path: Path, encoded: list[str]
) -> None:
    first = rows(opened(cache(tmp_path / "cache", small_tokenizer), task))
    assert encoded == ["a.jsonl", "b.jsonl"] and len(first) == 70
    assert rows(opened(cache(tmp_path / "cache", small_tokenizer), task)) == first
    assert encoded == ["a.jsonl", "b.jsonl"] and nothing_half_written(tmp_path / "cache")


def longer(file: Path) -> None:
    was = file.stat()
    with file.open("ab") as handle:
        handle.write(lines(1))
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))


def touched(file: Path) -> None:
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("change", [longer, touched])
def test_a_changed_file_is_encoded_again_and_no_other(
    small_tokenizer: Tokenizer, task: Task, tmp_path: Path, encoded: list[str], change: Callable[[Path], None]
) -> None:
    opened(cache(tmp_path / "cache", small_tokenizer), task)
    before = {path: path.stat() for path in (tmp_path / "cache").rglob("*.arrow")}
    encoded.clear()
    change(task.directory / "b.jsonl")
    again = opened(cache(tmp_path / "cache", small_tokenizer), task)
    assert encoded == ["b.jsonl"] and len(again) == (71 if change is longer else 70)
    for path, was in before.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (was.st_ino, was.st_mtime_ns)


def test_by_contents_a_file_that_was_only_touched_is_the_same(
    small_tokenizer: Tokenizer, task: Task, tmp_path: Path, encoded: list[str]
) -> None:
    opened(cache(tmp_path / "cache", small_tokenizer, by_contents=True), task)
    encoded.clear()
    touched(task.directory / "a.jsonl")
    opened(cache(tmp_path / "cache", small_tokenizer, by_contents=True), task)
    assert encoded == []


def test_by_contents_other_bytes_of_the_same_size_and_time_are_noticed(
    small_tokenizer: Tokenizer, task: Task, tmp_path: Path, encoded: list[str]
) -> None:
    file = task.directory / "a.jsonl"
    for by_contents, noticed in [(False, []), (True, ["a.jsonl"])]:
        first = rows(opened(cache(tmp_path / "cache", small_tokenizer, by_contents=by_contents), task))
        was, content = file.stat(), file.read_bytes()
        file.write_bytes(content.replace(b"question 7?", b"question 8?"))
        os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
        encoded.clear()
        again = rows(opened(cache(tmp_path / "cache", small_tokenizer, by_contents=by_contents), task))
        assert encoded == noticed and (again == first) is not by_contents
        file.write_bytes(content)


def test_a_directory_that_moved_is_another_one_and_a_link_to_it_is_not(
    small_tokenizer: Tokenizer, task: Task, tmp_path: Path, encoded: list[str]
) -> None:
    opened(cache(tmp_path / "cache", small_tokenizer), task)
    encoded.clear()
    link = tmp_path / "elsewhere" / task.name
    link.parent.mkdir()
    link.symlink_to(task.directory)
    opened(cache(tmp_path / "cache", small_tokenizer), Task(task.name, link))
    assert encoded == []
    shutil.copytree(task.directory, tmp_path / "copy" / task.name)
    opened(cache(tmp_path / "cache", small_tokenizer), Task(task.name, tmp_path / "copy" / task.name))
    assert encoded == ["a.jsonl", "b.jsonl"]


def test_other_ways_to_encode_share_nothing(
    small_tokenizer: Tokenizer, task: Task, tmp_path: Path, encoded: list[str]
) -> None:
    model = str(ROOT / "examples" / "model")
    fewer = load_tokenizer(model)
    fewer.add_tokens(["question"])
    marked = load_tokenizer(model)
    add_role_tokens(marked)
    ways = [
        cache(tmp_path / "cache", small_tokenizer),
        cache(tmp_path / "cache", fewer),
        cache(tmp_path / "cache", marked),
        cache(tmp_path / "cache", load_tokenizer(model, eos_token="<|padding|>")),
        cache(tmp_path / "cache", small_tokenizer, tokenize_mode="pretrain"),
        cache(tmp_path / "cache", small_tokenizer, normalize_punctuation=True),
    ]
    for way in [*ways, *ways]:
        opened(way, task)
    assert encoded == ["a.jsonl", "b.jsonl"] * len(ways)
    assert len({str(way.open(task)[0].path) for way in ways}) == len(ways)


# --- files of every kind


def test_an_empty_file_and_a_blank_one_among_others(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = write(tmp_path / "gaps", a=b"", b=lines(2), c=b"\n \n", d=lines(3, 2), e=b"")
    for _ in range(2):
        store = opened(cache(tmp_path / "cache", small_tokenizer), task)
        places = [store.where(record) for record in range(len(store))]
        assert [(file.name, line) for file, line in places] == [("b.jsonl", 1), ("b.jsonl", 2), ("d.jsonl", 1)]


@pytest.mark.parametrize("name", ["two words + é", "長い" * 40, "n" * 255], ids=["spaces", "wide", "long"])
def test_tasks_and_files_of_any_name(small_tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    task = write(tmp_path / name, **{name[:80]: lines(3), "ein 'Name'\n": lines(4, 3)})
    assert len(opened(cache(tmp_path / "cache", small_tokenizer), task)) == 4


def open_files() -> int:
    """How many this process holds, without those that tests before have left to the garbage collector."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def test_more_files_than_a_process_may_usually_hold_open(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = write(tmp_path / "many", **{f"part_{n:03}": lines(n + 1, n) for n in range(150)})
    (soft, hard), held_before = resource.getrlimit(resource.RLIMIT_NOFILE), open_files()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (held_before + 90, hard))
        assert len(rows(opened(cache(tmp_path / "cache", small_tokenizer), task))) == 150
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(300, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (held_before + 250, hard))
        held = opened(cache(tmp_path / "cache", small_tokenizer), task)  # which would fit, and leave little
        assert len(held) == 150 and resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(300, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_files_than_a_process_may_ever_hold_open_are_told(
    small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write(tmp_path / "many", **{f"part_{n:03}": lines(n + 1, n) for n in range(150)})
    (soft, hard), few = resource.getrlimit(resource.RLIMIT_NOFILE), open_files() + 90
    monkeypatch.setattr(token_store, "OPEN_FILES", few)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
        with pytest.raises(
            UserError,
            match=r"data\.cache_dir: .*arrow cannot be read \(Too many open files\)\. Every data file is held",
        ):
            opened(cache(tmp_path / "cache", small_tokenizer), task)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- what goes wrong


@contextmanager
def after(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], object]) -> Iterator[None]:
    """Do something when a function of the cache has returned, once."""
    real = getattr(token_cache, name)

    def then(*arguments: Any, **named: Any) -> Any:
        found = real(*arguments, **named)
        monkeypatch.setattr(token_cache, name, real)
        act()
        return found

    monkeypatch.setattr(token_cache, name, then)
    yield


def test_a_file_that_changes_while_it_is_read_is_an_error_and_nothing_of_it_is_kept(
    small_tokenizer: Tokenizer, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        after(monkeypatch, "write_batches", lambda: longer(task.directory / "a.jsonl")),
        pytest.raises(UserError, match=r"a\.jsonl: was changed while it was read\. Start again"),
    ):
        opened(cache(tmp_path / "cache", small_tokenizer), task)
    assert kept(tmp_path / "cache") == {} and nothing_half_written(tmp_path / "cache")
    assert len(opened(cache(tmp_path / "cache", small_tokenizer), task)) == 71


def test_a_file_that_changed_while_another_process_held_the_lock_is_encoded_as_it_is_now(
    small_tokenizer: Tokenizer, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with after(monkeypatch, "_locked", lambda: longer(task.directory / "a.jsonl")):
        assert len(opened(cache(tmp_path / "cache", small_tokenizer), task)) == 71


def test_a_file_that_is_taken_away_is_told(
    small_tokenizer: Tokenizer, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for when in ["find_files", "read_blocks"]:
        write(task.directory, a=lines(60), b=lines(70, 60))
        with (
            after(monkeypatch, when, (task.directory / "b.jsonl").unlink),
            pytest.raises(UserError, match=r"b\.jsonl: cannot be read \(No such file"),
        ):
            opened(cache(tmp_path / when, small_tokenizer), task)


def test_a_bad_line_stops_the_work_where_it_stands(
    small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write(tmp_path / "bad", a=lines(3), b=b"{\n" + lines(2000))
    read: list[int] = []

    def counted(file: Path) -> Iterator[Any]:
        for block in read_blocks(file, BLOCK):
            read.append(block.first)
            yield block

    def refuse(store: TokenStore) -> None:
        if len(store.unusable):
            raise UserError(f"{store.where(int(store.unusable[0]))}")

    monkeypatch.setattr(token_cache, "read_blocks", counted)
    with pytest.raises(UserError, match=r"b\.jsonl'\), 1\)"):
        opened(cache(tmp_path / "cache", small_tokenizer), task, refuse)
    assert read == [1, 1]
    assert len(kept(tmp_path / "cache")) == 1 and nothing_half_written(tmp_path / "cache")


def test_a_full_disk_is_told_and_nothing_half_written_is_left(
    small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write(tmp_path / "big", a=lines(2), b=lines(3000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # as near to a full disk as a test comes
        with pytest.raises(UserError, match=r"data\.cache_dir: .* cannot be written \(File too large\)\. Give another"):
            opened(cache(tmp_path / "cache", small_tokenizer), task)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(kept(tmp_path / "cache")) == 1 and nothing_half_written(tmp_path / "cache")
    assert len(opened(cache(tmp_path / "cache", small_tokenizer), task)) == 3002


def test_a_place_that_cannot_be_written_is_told(small_tokenizer: Tokenizer, task: Task, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(UserError, match=r"data\.cache_dir: .* cannot be written \(Not a directory\)"):
        opened(cache(tmp_path / "file" / "cache", small_tokenizer), task)


def test_a_damaged_file_of_the_cache_is_named(small_tokenizer: Tokenizer, task: Task, tmp_path: Path) -> None:
    first = cache(tmp_path / "cache", small_tokenizer).open(task)[0].path
    assert first is not None
    first.write_bytes(first.read_bytes()[:-50])
    with pytest.raises(UserError) as caught:
        opened(cache(tmp_path / "cache", small_tokenizer), task)
    assert "data.cache_dir: a file of the token cache is damaged" in str(caught.value)
    assert str(first) in str(caught.value) and str(caught.value).endswith("Delete it.")


def test_what_a_killed_process_left_is_removed_when_nobody_writes_to_it_any_more(
    small_tokenizer: Tokenizer, task: Task, tmp_path: Path
) -> None:
    (first,) = {file.path.parent for file in cache(tmp_path / "cache", small_tokenizer).open(task) if file.path}
    for name, age in [("old.partial", ABANDONED + 1), ("young.partial", ABANDONED - 60)]:
        (first / name).write_bytes(b"ARROW1")
        os.utime(first / name, (time.time() - age,) * 2)
    opened(cache(tmp_path / "cache", small_tokenizer), task)
    assert [path.name for path in first.glob("*.partial")] == ["young.partial"]


def test_processes_that_encode_need_neither_torch_nor_transformers() -> None:
    code = "import mft_lightning.data.encoding, sys; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
