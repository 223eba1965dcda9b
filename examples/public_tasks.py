"""Three public data sets as three tasks, for docs/tutorial.md.

    python examples/public_tasks.py DOWNLOADS TASKS

DOWNLOADS has the files as their authors publish them: ``test.jsonl`` of GSM8K (https://github.com/openai/grade-school-math,
MIT), ``mbpp.jsonl`` (https://github.com/google-research/google-research/tree/master/mbpp, CC-BY-4.0) and
``HumanEval.jsonl.gz`` (https://github.com/openai/human-eval, MIT). TASKS gets a directory for each.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def grade_school_math(problem: Record) -> Record:
    return {"prompt": problem["question"], "answer": problem["answer"]}


def text_to_code(problem: Record) -> Record:
    """Two rounds: the function, then the assertions that it is tested by."""
    turns = [
        ("system", "You are an expert in coding and help answer code questions"),
        ("user", problem["text"]),
        ("assistant", problem["code"].replace("\r\n", "\n")),
        ("user", "Write assertions that test this function."),
        ("assistant", "\n".join(problem["test_list"])),
    ]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def code_completion(problem: Record) -> Record:
    return {"prompt": problem["prompt"], "answer": problem["canonical_solution"]}


SOURCES = {"test.jsonl": grade_school_math, "mbpp.jsonl": text_to_code, "HumanEval.jsonl.gz": code_completion}


def read(file: Path) -> Iterator[Record]:
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def converted(file: Path, convert: Callable[[Record], Record]) -> list[Record]:
    """A task's records out of a download; ends the program, in one line, where that is not what is published."""
    try:
        return [convert(problem) for problem in read(file)]
    except FileNotFoundError:
        raise SystemExit(f"error: {file} is not there. docs/tutorial.md has the command that downloads it.") from None
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"error: {file} is not as its authors publish it ({error!r}). Download it again.") from None


def main(downloads: str, tasks: str) -> None:
    """Convert all of them, then write."""
    found = {convert.__name__: converted(Path(downloads) / name, convert) for name, convert in SOURCES.items()}
    for name, records in found.items():
        task = Path(tasks) / name
        task.mkdir(parents=True, exist_ok=True)
        (task / "part-00.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records), encoding="utf-8")
        print(f"{task}: {len(records):,} conversations")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python examples/public_tasks.py DOWNLOADS TASKS")
    main(*sys.argv[1:])
