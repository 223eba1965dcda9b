"""Runs that are killed again and again end as one that never was, and it would be noticed if they did not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.integration.conftest import ROOT, user_environment
from tests.integration.same_run import differences

CASES = ("full-case1-padding", "lora-famo", "ddp-full-famo")
LAST = "step-00000004"


def kills(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "tests/integration/kills.py", *words]
    return subprocess.run(line, cwd=ROOT, env=user_environment(), capture_output=True, text=True, check=False)


def test_killed_runs_end_as_one_that_never_was(tmp_path: Path) -> None:
    only = [word for name in CASES for word in ("--only", name)]
    done = kills("--kills", "20", *only, "--directory", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1].split()
    assert last[:2] == ["all", "20"] and last[-1] == "yes"


def _short_run(fit: Callable[..., Path], directory: Path) -> Path:
    return fit(directory, "--trainer.max_steps", "4", "--checkpoint.checkpointing_steps", "2")


def _copied(run: Path, target: Path) -> Path:
    """A run as if it had been made in another directory."""
    shutil.copytree(run, target, symlinks=True)
    config = target / "config.yaml"
    config.write_text(config.read_text().replace(str(run), str(target)))
    return target


def _one_weight(run: Path) -> None:
    file = run / LAST / "model.safetensors"
    tensors = load_file(file)
    tensors["embed_out.weight"].view(torch.int32)[0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})


def _one_sign_of_zero(run: Path) -> None:
    file = run / LAST / "trainer.pt"
    state = torch.load(file, weights_only=True)
    moments = state["optimizer_states"][0]["state"][0]
    moments["step"] = torch.where(moments["step"] == 0, 1.0, -moments["step"])
    torch.save(state, file)


def _one_counter(run: Path) -> None:
    file = run / LAST / "trainer.pt"
    state = torch.load(file, weights_only=True)
    state["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"] += 1
    torch.save(state, file)


def _one_metric(run: Path) -> None:
    file = run / "metrics.csv"
    lines = file.read_text().splitlines()
    lines[-1] = lines[-1].replace(".", ".0", 1)
    file.write_text("\n".join(lines) + "\n")


def _one_row(run: Path) -> None:
    file = run / "metrics.csv"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")


def _curves(run: Path) -> None:
    """The last event of TensorBoard's file, cut short as a kill would."""
    file = max((run / "runs").glob("events.*"), key=lambda file: file.suffix != ".about")
    file.write_bytes(file.read_bytes()[:-20])


def _metadata(run: Path) -> None:
    file = run / LAST / "checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"epoch": 7}, indent=2) + "\n")


def _link(run: Path) -> None:
    (run / "best").unlink()
    (run / "best").symlink_to("step-00000002")


def _remains(run: Path) -> None:
    (run / ".step-00000006.tmp").mkdir()


def _no_checkpoint(run: Path) -> None:
    shutil.rmtree(run / LAST)


SPOILT = {
    _one_weight: f"{LAST}/model.safetensors['embed_out.weight']: differs in 1 of",
    _one_sign_of_zero: f"{LAST}/trainer.pt['optimizer_states'][0]['state'][0]['step']: differs in 1 of 1 numbers",
    _one_counter: f"{LAST}/trainer.pt['loops']['fit_loop']['epoch_progress']['current']['ready']: is 2, not 1",
    _one_metric: "metrics.csv at step 4[",
    _one_row: "metrics.csv: has rows of steps 0, 1, 2, 3, 4, not 0, 1, 2, 3, 4, 4",
    _curves: "runs/val/",
    _metadata: f"{LAST}/checkpoint.json['epoch']: is 7, not 0",
    _link: "best: is 'step-00000002', not 'step-00000004'",
    _remains: ".step-00000006.tmp: is left over",
    _no_checkpoint: f"{LAST}: is missing",
}


def test_every_kind_of_difference_is_noticed(fit: Callable[..., Path], tmp_path: Path) -> None:
    run = _short_run(fit, tmp_path / "run")
    assert differences(run, _copied(run, tmp_path / "copy")) == []
    for spoil, line in SPOILT.items():
        spoilt = _copied(run, tmp_path / spoil.__name__)
        spoil(spoilt)
        found = differences(run, spoilt)
        assert found and found[0].startswith(line), (spoil.__name__, found)


def test_a_difference_ends_the_command_with_an_error(fit: Callable[..., Path], tmp_path: Path) -> None:
    case = tmp_path / CASES[0]
    run = _short_run(fit, case / "whole")
    _one_weight(_copied(run, case / "killed-1"))
    done = kills("--kills", "0", "--only", CASES[0], "--directory", str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{CASES[0]}: killed-1/{SPOILT[_one_weight]}" in done.stdout
    assert done.stdout.splitlines()[-2].split()[0] == "all" and done.stdout.splitlines()[-2].split()[-1] == "no"
