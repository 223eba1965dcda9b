"""``prepare`` fills the token cache; what comes after it with the same keys encodes nothing."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from mft_lightning.cli import main
from mft_lightning.data import token_cache
from mft_lightning.data.lines import read_blocks
from tests.integration.conftest import ROOT, TASKS, command, everything

GOOD = {"prompt": "What is 1 + 1?", "answer": "2"}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are encoded, as it happens."""
    names: list[str] = []

    def read(file: Path) -> Iterator[Any]:
        names.append(f"{file.parent.name}/{file.name}")
        return read_blocks(file)

    monkeypatch.setattr(token_cache, "read_blocks", read)
    return names


@pytest.fixture
def prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run ``prepare`` with a cache of the test's own: exit code, what it printed, what it said on standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        mine = ("--config", str(ROOT / "configs" / "full.yaml"), "--data.cache_dir", str(tmp_path / "cache"))
        code = main(["prepare", *mine, *words])
        return code, *capsys.readouterr()

    return run


def test_it_prints_what_there_is_of_each_task_and_where_it_is_kept(
    prepare: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--config", "configs/full.yaml", "--data.cache_dir", str(tmp_path / "cache"))
    done = command("prepare", *words)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [name for name in TASKS if any(line.startswith(name) for line in lines)] == list(TASKS)
    files = list((tmp_path / "cache").rglob("*.arrow"))
    size = sum(file.stat().st_size for file in files) / 1e6
    assert f"{len(files)} file(s) in {size:,.1f} MB" in done.stdout and str(tmp_path / "cache") in done.stdout
    monkeypatch.chdir(ROOT)
    assert prepare() == (0, done.stdout, "")


def test_what_comes_after_it_encodes_nothing(
    prepare: Callable[..., tuple[int, str, str]],
    fit_arguments: Callable[..., list[str]],
    encoded: list[str],
    tmp_path: Path,
    example_tasks: list[str],
    tiny_model: Path,
) -> None:
    same = ("--data.data_paths", f"[{','.join(example_tasks)}]", "--model.pretrained_model_path", str(tiny_model))
    assert prepare(*same)[0] == 0
    assert {name.partition("/")[0] for name in encoded} == set(TASKS)
    kept = [(path, written) for path, written in everything(tmp_path / "cache") if path.suffix == ".arrow"]
    encoded.clear()
    assert prepare(*same)[0] == 0
    words = ("--trainer.max_steps", "1", "--data.cache_dir", str(tmp_path / "cache"))
    assert main(["fit", *fit_arguments(tmp_path / "run", *words)]) == 0
    assert encoded == []
    assert [pair for pair in everything(tmp_path / "cache") if pair[0].suffix == ".arrow"] == kept


def test_it_fills_the_users_cache_where_no_other_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_task: Callable[..., str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of the user"))
    task = write_task("sums", [GOOD] * 30)
    assert main(["prepare", "--config", str(ROOT / "configs" / "full.yaml"), "--data.data_paths", f"[{task}]"]) == 0
    found = list((tmp_path / "of the user" / "mft_lightning" / "tokens").rglob("*.arrow"))
    assert len(found) == 1 and found[0].parent.name.startswith("sums-")


def test_compressed_files_are_read_as_plain_ones_are(
    prepare: Callable[..., tuple[int, str, str]], write_task: Callable[..., str], tmp_path: Path
) -> None:
    records = [{"prompt": f"{n} + {n}?", "answer": str(2 * n)} for n in range(60)]
    raw = "".join(json.dumps(record) + "\n" for record in records).encode()
    packed, plain = Path(write_task("packed", records[:20], "a.jsonl")), Path(write_task("plain", records))
    (packed / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(raw.splitlines(keepends=True)[20:40])))
    with pyarrow.CompressedOutputStream(str(packed / "c.jsonl.zst"), "zstd") as stream:
        stream.write(b"".join(raw.splitlines(keepends=True)[40:]))
    code, said, _ = prepare("--data.data_paths", f"[{packed},{plain}]", "--data.data_split", "100,0,0")
    assert code == 0 and "4 file(s)" in said
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.startswith(("packed", "plain"))}
    assert rows["packed"] == rows["plain"] and rows["plain"][0] == "60"


def test_a_bad_record_stops_it_with_its_place_and_leaves_nothing_half_written(
    prepare: Callable[..., tuple[int, str, str]], write_task: Callable[..., str], tmp_path: Path
) -> None:
    task = write_task("broken", [GOOD] * 30, "a.jsonl")
    write_task("broken", [GOOD, "{", GOOD], "b.jsonl")
    words = ("--data.data_paths", f"[{task}]")
    code, said, error = prepare(*words)
    assert (code, said) == (1, "") and error.startswith(f"error: {task}/b.jsonl:2: is not valid JSON")
    assert "data.on_bad_record: skip" in error and error.count("\n") == 1
    assert [path.suffix for path, _ in everything(tmp_path / "cache") if path.is_file() and path.suffix] == [".arrow"]
    assert prepare(*words, "--data.on_bad_record", "skip")[0] == 0
    code, _, error = prepare(*words)  # all of it is in the cache now, and the line is as bad as before
    assert code == 1 and f"{task}/b.jsonl:2: is not valid JSON" in error


def test_too_many_bad_records_end_it_with_the_first_of_them(
    prepare: Callable[..., tuple[int, str, str]], write_task: Callable[..., str]
) -> None:
    task = write_task("broken", [GOOD, "{", GOOD])
    code, _, error = prepare("--data.data_paths", f"[{task}]", "--data.on_bad_record", "skip")
    assert code == 1 and "1 of 3 records are bad" in error and "part.jsonl:2" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data.cache_dir", "{file}/cache"), "data.cache_dir: {file}/cache/"),
        (("--data.cache_dir", ""), "data.cache_dir: is empty"),
        (("--data.preprocessing_num_workers", "0"), "data.preprocessing_num_workers: 0 is less than 1"),
        (("--data.data_paths", "[{file}]"), "is not a directory"),
        (("--data.cash_dir", "x"), "data.cash_dir: there is no such key. The nearest is data.cache_dir."),
    ],
)
def test_what_cannot_be_done_is_one_message_and_exit_code_1(
    prepare: Callable[..., tuple[int, str, str]], tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    file = tmp_path / "file"
    file.write_text("no directory")
    code, said, error = prepare(*(word.format(file=file) for word in words))
    assert (code, said) == (1, "") and error.startswith("error: ") and message.format(file=file) in error
    assert "Traceback" not in error


def test_a_cache_that_can_only_be_read_serves_what_it_holds(
    prepare: Callable[..., tuple[int, str, str]], encoded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare()[0] == 0
    encoded.clear()

    def refuse(*_: object) -> None:
        raise AssertionError("it must not be locked")

    monkeypatch.setattr(token_cache, "_locked", refuse)
    assert prepare()[0] == 0 and encoded == []


def test_what_is_wrong_with_a_later_task_is_told_before_an_earlier_one_is_tokenised(
    prepare: Callable[..., tuple[int, str, str]], write_task: Callable[..., str], encoded: list[str], tmp_path: Path
) -> None:
    good, valid = write_task("good", [GOOD] * 4), str(tmp_path / "gone" / "good")
    (tmp_path / "bad").mkdir()
    code, _, told = prepare("--data.data_paths", f"[{good},{tmp_path / 'bad'}]")
    assert code != 0 and "data.data_paths: no *.jsonl file in" in told
    code, _, told = prepare(
        "--data.data_paths", f"[{good}]", "--data.data_split", "null", "--data.valid_data_paths", f"[{valid}]"
    )
    assert code != 0 and f"data.valid_data_paths: {valid} is not a directory" in told
    assert not encoded


def test_files_that_look_like_data_and_are_not_read_are_told(
    prepare: Callable[..., tuple[int, str, str]], write_task: Callable[..., str]
) -> None:
    task = write_task("some", [GOOD] * 40)
    for number in range(7):
        (Path(task) / f"{number}.json").touch()
    code, said, _ = prepare("--data.data_paths", f"[{task}]")
    assert code == 0 and "not read of some: 0.json, 1.json, 2.json, 3.json, 4.json and 2 more; its data are" in said


@pytest.mark.parametrize("name", ["prepare", "inspect"])
def test_what_the_model_cannot_take_is_told_before_anything_is_tokenised(
    tmp_path: Path,
    example_tasks: list[str],
    tiny_model: Path,
    encoded: list[str],
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    words = ["--config", str(ROOT / "configs" / "full.yaml"), "--data.cache_dir", str(tmp_path / "cache")]
    words += ["--data.data_paths", str(example_tasks), "--model.pretrained_model_path", str(tiny_model)]
    for refused, message in {
        ("--data.seq_length", "100000"): "data.seq_length: 100000 is more than the",
        (
            "--data.task_weights",
            "[1, 2, 3]",
            "--model.weighted_loss_mode",
            "case1",
        ): "data.task_weights: model.weighted",
    }.items():
        assert main([name, *words, *refused]) == 1
        assert message in capsys.readouterr().err
    assert not encoded
