"""The tutorial's script makes of the published files what the corpus of the tests was made of."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from examples.public_tasks import main
from mft_lightning.data.records import parse_record


def rounds(task: str) -> list[list[str]]:
    """What was said in each conversation of a task of the corpus."""
    lines = [line for file in sorted(Path(task).glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [[turn["content"] for turn in json.loads(line)["chat_rounds"]] for line in lines]


def test_the_script_makes_the_corpus(real_tasks: list[str], tmp_path: Path) -> None:
    tasks = {Path(task).name: rounds(task) for task in real_tasks}
    math = [{"question": question, "answer": answer} for question, answer in tasks["grade_school_math"]]
    code: list[dict[str, Any]] = [
        {"text": said[1], "code": said[2].replace("\n", "\r\n"), "test_list": said[4].split("\n")}
        for said in tasks["text_to_code"]
    ]
    completed = [{"prompt": prompt, "canonical_solution": answer} for prompt, answer in tasks["code_completion"]]
    for name, records in (("test.jsonl", math), ("mbpp.jsonl", code)):
        (tmp_path / name).write_text("".join(f"{json.dumps(one)}\n" for one in records))
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.writelines(f"{json.dumps(one)}\n" for one in completed)
    main(str(tmp_path), str(tmp_path / "tasks"))
    for name, expected in tasks.items():
        lines = (tmp_path / "tasks" / name / "part-00.jsonl").read_bytes().splitlines()
        assert [[turn.content for turn in parse_record(line).turns] for line in lines] == expected


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("mbpp.jsonl", None, "mbpp.jsonl is not there. docs/tutorial.md has the command that downloads it."),
        ("test.jsonl", b"404: Not Found\n", "test.jsonl is not as its authors publish it (JSONDecodeError("),
        ("mbpp.jsonl", b'{"prompt": 1}\n', "mbpp.jsonl is not as its authors publish it (KeyError('text'))"),
        (
            "HumanEval.jsonl.gz",
            b"404: Not Found\n",
            "HumanEval.jsonl.gz is not as its authors publish it (BadGzipFile(",
        ),
        (
            "HumanEval.jsonl.gz",
            gzip.compress(b"{}\n" * 99, mtime=0)[:-9],
            "HumanEval.jsonl.gz is not as its authors publish it",
        ),
    ],
)
def test_a_download_that_is_missing_or_other_is_named(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    (tmp_path / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "mbpp.jsonl").write_text('{"text": "Add.", "code": "a + b", "test_list": ["assert"]}\n')
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write('{"prompt": "def f():", "canonical_solution": "return"}\n')
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main(str(tmp_path), str(tmp_path / "tasks"))
    assert str(ended.value).startswith(f"error: {tmp_path}/{said}") and not (tmp_path / "tasks").exists()
