"""The examples in the repository are what their generator writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.training.questions import questions

ROOT = Path(__file__).resolve().parents[2]


def test_the_generator_writes_the_committed_files_to_the_byte(tmp_path: Path) -> None:
    script = ROOT / "examples" / "make_quickstart.py"
    subprocess.run([sys.executable, str(script), "--output", str(tmp_path)], check=True, capture_output=True)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(written) == 9
    for path in written:
        assert (tmp_path / path).read_bytes() == (ROOT / "examples" / path).read_bytes(), path


def test_held_out_prompts_share_no_prompt_with_training() -> None:
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    datamodule = MFTDataModule(**config["data"], tokenizer_path="examples/model", seed=config["seed_everything"])
    prompts = {
        split: [(asked.held.task, tuple(asked.held.prompt)) for asked in questions(datamodule, split, 1000, 0)]
        for split in ("train", "valid")
    }
    assert not set(prompts["train"]) & set(prompts["valid"])
    assert len(set(prompts["valid"])) == len(prompts["valid"]) == 60 + 2 * 40 + 24
    assert len(prompts["train"]) == 540 + 2 * 360 + 216


def test_the_tasks_are_of_the_shapes_a_user_meets() -> None:
    """Unequal sizes, several files, a system turn, several rounds."""
    sizes, files, roles = {}, {}, {}
    for task in sorted((ROOT / "examples" / "quickstart").iterdir()):
        found = sorted(task.iterdir())
        lines = [json.loads(line) for file in found for line in file.read_text().splitlines()]
        sizes[task.name], files[task.name] = len(lines), len(found)
        roles[task.name] = {tuple(turn["role"] for turn in line["chat_rounds"]) for line in lines}
    assert len(set(sizes.values())) == 3 and max(files.values()) > 1
    assert roles["text_to_code"] == {("system", "human", "bot")}
    assert roles["code_explanation"] == {("human", "bot", "human", "bot")}
    assert roles["unit_tests"] == {("human", "bot")}
