"""Bad records that a run skips: counted, shown, and listed one by one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

GOOD = {"prompt": "2 + 2?", "answer": "4"}


def skipped(output_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output_dir / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_skipped_record_is_listed_with_its_reason(
    fit: Callable[..., Path], write_task: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_task("first", [GOOD] * 30 + ["nope", {"prompt": "x"}])
    second = write_task("second", [{"text": "tell\u2028me"}, *[GOOD] * 20, {"prompt": "a" * 3000, "answer": "b"}])
    words = ["--data.data_paths", f"[{first},{second}]", "--trainer.max_steps", "2"]
    words += ["--data.on_bad_record", "skip", "--data.max_skipped_share", "0.1"]
    output = fit(tmp_path / "run", *words)
    printed = capsys.readouterr().out
    assert "1 invalid-json, 1 missing-content" in printed and "1 text-in-sft, 1 overlong" in printed
    assert "3 bad record(s) are left out" in printed and str(output / "skipped.jsonl") in printed
    found = skipped(output)
    assert [(record["task"], record["line"], record["reason"]) for record in found] == [
        ("first", 31, "invalid-json"),
        ("first", 32, "missing-content"),
        ("second", 1, "text-in-sft"),
    ]
    assert {record["file"] for record in found[:2]} == {f"{first}/part.jsonl"}
    assert all(record["split"] in ("train", "valid") and record["detail"] for record in found)
    fit(output, *words, "--trainer.max_steps", "3", "--ckpt_path", "last")
    assert skipped(output) == found


def test_without_bad_records_there_is_no_list(
    fit: Callable[..., Path], write_task: Callable[..., str], tmp_path: Path
) -> None:
    task = write_task("some", [GOOD] * 40)
    output = fit(tmp_path / "run", "--data.data_paths", f"[{task}]", "--trainer.max_steps", "1")
    assert not (output / "skipped.jsonl").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no file name that is not Unicode")
def test_a_file_name_that_is_no_unicode_is_listed_and_nothing_is_left_beside_the_list(
    fit: Callable[..., Path], write_task: Callable[..., str], tmp_path: Path
) -> None:
    task = Path(write_task("some", [GOOD] * 40))
    (task / os.fsdecode(b"caf\xe9.jsonl")).write_text("nope\n")
    words = ["--data.data_paths", f"[{task}]", "--data.on_bad_record", "skip", "--trainer.max_steps", "1"]
    output = fit(tmp_path / "run", *words)
    (record,) = skipped(output)
    assert os.fsencode(str(record["file"])) == os.fsencode(task) + b"/caf\xe9.jsonl"
    assert not list(output.glob(".*"))
