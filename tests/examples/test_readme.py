"""Every command of the README runs, in order, and prints what the README shows of it.

Making the environment is what ``.ci/run`` does with the README's own test command.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
INSTALL = re.compile(r"^python3 -m venv \.venv && \.venv/bin/pip install -q -c constraints\.txt -e \S+ && ")
TASKS = ("text_to_code", "code_explanation", "unit_tests")


def blocks() -> list[tuple[str, str]]:
    """(language, text) of the README's blocks, in order; continued lines as one."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [(language, re.sub(r"\\\n *", "", text)) for language, text in found]


def masked(text: str) -> list[str]:
    """Lines of a text with the fractions, whose last digits differ from machine to machine, made alike."""
    return [re.sub(r"\d+\.\d+", "0.0", re.sub(r" +", " ", line)).strip() for line in text.splitlines()]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory as a user has it after installing."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, words in (
        ("python", ""),
        ("tensorboard", " -m tensorboard.main"),
        ("torchrun", " -m torch.distributed.run"),
    ):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
        (programs / name).chmod(0o755)
    return tmp_path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(line: str, project: Path) -> str:
    result = subprocess.run(
        ["bash", "-c", line], cwd=project, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
    return result.stdout


def tags_on_the_page(line: str, project: Path) -> set[str]:
    """The scalars that the TensorBoard of the command shows."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {line} --port 0"], cwd=project, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        address = next(found for text in process.stderr if (found := re.search(r"http://\S+?:\d+/", text)))
        with urllib.request.urlopen(f"{address.group()}data/plugin/scalars/tags", timeout=60) as page:
            return {tag for tags in json.load(page).values() for tag in tags}
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_every_command_of_the_readme(project: Path) -> None:
    printed = ""
    commands = 0
    for language, text in blocks():
        if language == "text":
            missing = [line for line in masked(text) if line not in masked(printed)]
            assert not missing, f"the README shows what is not printed: {missing}\n{printed}"
        for line in text.splitlines() if language == "bash" else []:
            line = INSTALL.sub("", line)
            commands += 1
            if "tensorboard" in line:
                assert {f"val/loss/{task}" for task in TASKS} <= tags_on_the_page(line, project)
            elif "pytest" not in line:  # that is this
                printed = run(line, project)
            if line.endswith("fit --config configs/quickstart.yaml"):
                every_task_is_learnt(printed)
            if "torchrun" in line:
                assert "going on from step-00000004" in printed and "2 x cpu, fsdp" in printed
            if "--input" in line:
                answers = [json.loads(line) for line in printed.splitlines()]
    assert commands == 16
    made = {path.name for path in (project / "checkpoints").iterdir()}
    assert made == {"quickstart", "full", "lora", "merged", "ddp"}
    assert (project / "my_project" / "configs" / "quickstart.yaml").is_file()
    assert [(answer["prompt"], answer["reference"]) for answer in answers] == [("1 + 1?", "2"), ("2 + 3?", "5")]


def every_task_is_learnt(printed: str) -> None:
    """Ten times less loss than before training, nine of ten held-out answers right to the letter."""
    for task in TASKS:
        row = re.search(rf"^{task} .* (\d\.\d+) +(\d\.\d+) +\S+ +\S+ +(\d+) of (\d+)", printed, re.MULTILINE)
        assert row is not None, printed
        before, after, exact, asked = (float(value) for value in row.groups())
        assert before > 10 * after and exact >= 0.9 * asked and asked >= 24, row.group()


def test_the_readme_asks_what_was_not_trained_on() -> None:
    (prompt,) = re.findall(r"--prompt '([^']+)'", README)
    assert not any(prompt in file.read_text() for file in (ROOT / "examples" / "quickstart").rglob("*.jsonl"))
