"""What happens to a run and its checkpoints when the disk, another program or another run gets in the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mft_lightning.cli import main
from mft_lightning.training.checkpoint_choice import find_checkpoints, look_through
from mft_lightning.training.checkpoint_dirs import verify, write_description
from mft_lightning.training.run_lock import only_run_in
from tests.integration.conftest import checkpoints, everything, metrics, same_weights
from tests.training.test_run_lock import started

EVERY_STEP = ("--checkpoint.checkpointing_steps", "1", "--checkpoint.save_total_limit", "null")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """``small_disk("name", "size=4m")`` mounts a file system in memory, or changes its options."""
    mounted: set[Path] = set()

    def mount(name: str, options: str) -> Path:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        options = f"remount,{options}" if directory in mounted else options
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode and not mounted:
            pytest.skip(f"a file system in memory cannot be mounted here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        mounted.add(directory)
        return directory

    yield mount
    for directory in mounted:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Its one-screen message."""
    capsys.readouterr()
    assert main(words) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") <= 4 and "Traceback" not in message
    return message


def assert_whole_without_remains(run: Path) -> None:
    assert not look_through(run).damaged and not list(run.rglob("*.unfinished"))
    for info in find_checkpoints(run):
        verify(info.path)


def test_a_full_disk_costs_the_steps_since_the_last_checkpoint(
    fit: Callable[..., Path],
    fit_arguments: Callable[..., list[str]],
    small_disk: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A checkpoint has some 650 KiB; with more room the run ends as if the disk had always been large enough."""
    whole = fit(tmp_path / "whole", *EVERY_STEP)
    for size in ("2200k", "2500k", "2800k"):  # full in one file of a checkpoint or in another, or in the logs
        run = small_disk(size, f"size={size}") / "run"
        message = fails(["fit", *fit_arguments(run, *EVERY_STEP)], capsys)
        assert "cannot be written (" in message and "--ckpt_path last" in message
        assert_whole_without_remains(run)
        small_disk(size, "size=64m")
        fit(run, *EVERY_STEP, "--ckpt_path", "last")
        assert same_weights(run / "step-00000008", whole / "step-00000008") and metrics(run) == metrics(whole)


def test_a_file_system_that_becomes_read_only_ends_the_run_with_one_message(
    fit: Callable[..., Path],
    fit_arguments: Callable[..., list[str]],
    small_disk: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = fit(small_disk("disk", "size=64m") / "run", "--trainer.max_steps", "2")
    small_disk("disk", "ro,size=64m")
    before = everything(run)
    assert "Read-only file system" in fails(["fit", *fit_arguments(run, "--ckpt_path", "last")], capsys)
    assert "Read-only file system" in fails(["fit", *fit_arguments(run.parent / "new")], capsys)
    assert everything(run) == before


@pytest.mark.parametrize("what", ["run/step-00000002", "run"])
def test_what_is_removed_under_a_run_is_not_missed(fit: Callable[..., Path], tmp_path: Path, what: str) -> None:
    whole = fit(tmp_path / "whole", *EVERY_STEP)
    key = "--trainer.callbacks"
    removal = (f"{key}+=tests.integration.faults.Removal", f"{key}.path", str(tmp_path / what), f"{key}.step", "5")
    run = fit(tmp_path / "run", *EVERY_STEP, *removal)
    gone = 1 if what == "run/step-00000002" else 5
    assert len(checkpoints(run)) == 8 - gone
    assert same_weights(run / "step-00000008", whole / "step-00000008")
    assert_whole_without_remains(run)


def test_a_truncated_file_is_named_and_the_checkpoint_before_is_taken(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path / "run", *EVERY_STEP)
    file = run / "step-00000008" / "model.safetensors"
    before = file.read_bytes()
    os.truncate(file, 1000)
    message = refused(run, "--ckpt_path", str(file.parent))
    assert "step-00000008: is damaged: model.safetensors has 1,000 bytes of" in message
    capsys.readouterr()
    fit(run, *EVERY_STEP, "--ckpt_path", "last")
    said = capsys.readouterr().out
    assert "model.safetensors has 1,000 bytes of" in said and "Passed over for step-00000007" in said
    assert file.read_bytes() == before


def test_a_flipped_bit_is_found_by_every_command(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path / "run", "--trainer.max_steps", "2")
    file = run / "step-00000002" / "model.safetensors"
    contents = bytearray(file.read_bytes())
    contents[-100] ^= 1
    file.write_bytes(contents)
    for command in ("fit", "validate", "test"):
        assert "is not as it was written (SHA-256)" in refused(run, "--ckpt_path", "last", command=command)
    message = fails(["generate", "--model", str(file.parent), "--prompt", "?"], capsys)
    assert "model.safetensors is not as it was written (SHA-256)" in message


def test_a_second_run_in_a_directory_is_refused_and_changes_nothing(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    run = fit(tmp_path / "run", "--trainer.max_steps", "2")
    other = started(only_run_in(run).__enter__)
    try:
        for words in ((), ("--ckpt_path", "last")):
            assert f"another run is at work in {run} (process {other} on" in refused(run, *words)
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    fit(run, "--ckpt_path", "last", "--trainer.max_steps", "3")


def test_a_run_that_only_keeps_the_latest_state_goes_on_from_the_latest_alone(
    fit: Callable[..., Path], fit_arguments: Callable[..., list[str]], refused: Callable[..., str], tmp_path: Path
) -> None:
    words = ("--checkpoint.save_total_limit", "null", "--checkpoint.trainer_state", "latest")
    run = fit(tmp_path / "run", *words)
    assert [path.parent.name for path in run.rglob("trainer.pt")] == ["step-00000008"]
    assert_whole_without_remains(run)
    earlier = ("--ckpt_path", str(run / "step-00000004"))
    message = refused(run, *words, *earlier)
    assert "its trainer state was dropped (checkpoint.trainer_state: latest)" in message
    assert main(["validate", *fit_arguments(run, *words, *earlier)]) == 0  # which needs the weights alone
    fit(run, *words, "--ckpt_path", "last", "--trainer.max_steps", "9")
    assert [path.parent.name for path in run.rglob("trainer.pt")] == ["step-00000009"]


def test_the_checkpoint_that_was_resumed_from_rotates_like_any_other(fit: Callable[..., Path], tmp_path: Path) -> None:
    words = ("--evaluation.strategy", "none", "--checkpoint.save_total_limit", "1")
    run = fit(tmp_path / "run", *words, "--trainer.max_steps", "2")
    fit(run, *words, "--trainer.max_steps", "4", "--ckpt_path", "last")
    assert checkpoints(run) == ["step-00000004"]


def test_a_start_after_a_kill_draws_its_own_base(fit: Callable[..., Path], tmp_path: Path) -> None:
    """Of another seed, where the killed run had written its base and no checkpoint yet."""
    run = fit(tmp_path / "run", "--trainer.max_steps", "1", "--seed_everything", "7", config="lora.yaml")
    for directory in run.glob("step-*"):
        shutil.rmtree(directory)
    fit(run, "--trainer.max_steps", "2", "--ckpt_path", "last", config="lora.yaml")
    fresh = fit(tmp_path / "fresh", "--trainer.max_steps", "2", config="lora.yaml")
    assert same_weights(run / "base", fresh / "base") and not same_weights(run / "superseded" / "base", run / "base")
    for directory in fresh.glob("step-*"):
        shutil.rmtree(directory)
    fit(fresh, "--trainer.max_steps", "2", "--ckpt_path", "last", config="lora.yaml")
    assert not (fresh / "superseded").exists()  # the same base stays


def test_a_finished_run_started_again_removes_nothing_by_other_settings(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path / "run", *EVERY_STEP, "--trainer.max_steps", "4")
    for words in (("last",), (str(run / "step-00000004"), *EVERY_STEP), (str(run / "step-00000003"), *EVERY_STEP)):
        fit(run, "--trainer.max_steps", "3", "--ckpt_path", *words)
        assert "nothing to do" in capsys.readouterr().out
        assert len(checkpoints(run)) == 4
    shutil.copytree(run / "step-00000004", run / ".step-00000005.unfinished")
    fit(run, *EVERY_STEP, "--trainer.max_steps", "3", "--ckpt_path", "last")
    assert_whole_without_remains(run)


@pytest.mark.parametrize("writable", ["true", "false"])
def test_a_callback_whose_state_no_resume_could_load_is_named_at_the_first_save(
    fit_arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], writable: str
) -> None:
    """Where it has none before the run, when it would be refused."""
    words = ("--trainer.callbacks+=tests.integration.faults.LateState", "--trainer.callbacks.writable", writable)
    message = fails(["fit", *fit_arguments(tmp_path / "run", *words)], capsys)
    assert "the state of LateState (trainer.callbacks) holds other things than numbers" in message
    assert_whole_without_remains(tmp_path / "run")
    assert not checkpoints(tmp_path / "run")


def test_a_checkpoint_of_another_version_is_not_passed_over(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    run = fit(tmp_path / "run", *EVERY_STEP, "--trainer.max_steps", "2")
    file = run / "step-00000002" / "checkpoint.json"
    said = json.loads(file.read_text())
    write_description(file, {**said, "format": 99})
    assert "format 99 is not" in refused(run, "--ckpt_path", "last")
    file.write_text(json.dumps({**said, "format": 99}))  # whose checksum tells that this is no version's
    fit(run, "--ckpt_path", "last", "--trainer.max_steps", "3")
    assert checkpoints(run)[-1] == "step-00000003"


def test_what_was_superseded_goes_on_elsewhere_alone(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    run = fit(tmp_path / "run", *EVERY_STEP, "--trainer.max_steps", "2")
    fit(run, *EVERY_STEP, "--trainer.max_steps", "3", "--ckpt_path", str(run / "step-00000001"))
    old = ("--ckpt_path", str(run / "superseded" / "step-00000002"))
    assert "was superseded" in refused(run, *old)
    fit(tmp_path / "new", *old, "--trainer.max_steps", "3")


@pytest.mark.parametrize("hook", ["train_start", "sanity_check_start"])
def test_a_signal_before_the_first_step_ends_the_run_in_order(
    fit_arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], hook: str
) -> None:
    """Where Lightning hears it, and not yet this program."""
    words = ("--trainer.callbacks+=tests.integration.faults.EarlySignal", "--trainer.callbacks.hook", hook)
    with pytest.raises(SystemExit) as ended:
        main(["fit", *fit_arguments(tmp_path / "run", *words)])
    assert ended.value.code == 128 + signal.SIGTERM
    said = capsys.readouterr().out
    assert "stopped by SIGTERM" in said and "trained to step 0 of 8" in said
