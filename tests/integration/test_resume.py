"""A resumed run ends with the same bits as one that was never stopped, in the same files."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mft_lightning.cli import main
from mft_lightning.data.splits import parse_shares, split_records
from mft_lightning.training.same_run import set_position
from tests.integration.conftest import (
    ROOT,
    checkpoints,
    command,
    everything,
    metrics,
    same_weights,
    user_environment,
    written_again,
)

EPOCH_OF_FOUR = ("--data.total_train_batch_size", "300", "--data.per_device_train_batch_size", "75")
KEEP_ALL = ("--checkpoint.save_total_limit", "null", "--evaluation.steps", "3", "--checkpoint.checkpointing_steps", "2")


@pytest.mark.parametrize("config", ["full.yaml", "lora.yaml"])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_resume_from_any_checkpoint_is_bit_exact(
    fit: Callable[..., Path], tmp_path: Path, config: str, workers: str
) -> None:
    """Within an epoch, at its end, with and without a validation at that step; LoRA's dropout is on."""
    words = (*EPOCH_OF_FOUR, *KEEP_ALL, "--trainer.max_steps", "10", "--data.num_workers", workers)
    whole = fit(tmp_path / "whole", *words, config=config)
    assert checkpoints(whole) == [f"step-{step:08d}" for step in (2, 3, 4, 6, 8, 9, 10)]
    for step in (2, 3, 4, 6, 8) if workers == "0" else (6,):
        start = whole / f"step-{step:08d}"
        part = tmp_path / f"from-{step}"
        fit(part, *words, "--ckpt_path", str(start), config=config)
        assert same_weights(part / "step-00000010", whole / "step-00000010"), step
        assert [row for row in metrics(whole) if int(row["step"]) > step] == metrics(part)
        ours, theirs = (torch.load(run / "step-00000010" / "trainer.pt", weights_only=True) for run in (part, whole))
        assert str(ours["optimizer_states"]) == str(theirs["optimizer_states"])


def test_resume_goes_on_in_the_same_curves_and_moves_newer_checkpoints_aside(
    fit: Callable[..., Path], tmp_path: Path
) -> None:
    run = fit(tmp_path / "run", *KEEP_ALL)
    before = metrics(run)
    fit(run, *KEEP_ALL, "--ckpt_path", str(run / "step-00000004"))
    assert metrics(run) == before
    assert same_weights(run / "step-00000008", run / "superseded" / "step-00000008")
    events = EventAccumulator(str(run / "runs"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("val/loss")] == [0, 3, 6, 8]


def test_last_goes_on_to_a_later_end_within_an_epoch(fit: Callable[..., Path], tmp_path: Path) -> None:
    """A run that max_steps ended in the middle of an epoch goes on with the batches that are left of it."""
    constant = (*EPOCH_OF_FOUR, "--model.lr_scheduler_type", "constant")
    whole = fit(tmp_path / "whole", *constant, "--trainer.max_steps", "9")
    part = fit(tmp_path / "part", *constant, "--trainer.max_steps", "3")
    fit(part, *constant, "--trainer.max_steps", "9", "--ckpt_path", "last")
    assert same_weights(part / "step-00000009", whole / "step-00000009")


def test_epochs_resume_too(fit: Callable[..., Path], tmp_path: Path) -> None:
    words = (*EPOCH_OF_FOUR, *KEEP_ALL, "--trainer.max_steps", "-1", "--trainer.max_epochs", "2")
    whole = fit(tmp_path / "whole", *words)
    assert checkpoints(whole)[-1] == "step-00000008"
    for step in (2, 4, 6):
        part = fit(tmp_path / f"from-{step}", *words, "--ckpt_path", str(whole / f"step-{step:08d}"))
        assert same_weights(part / "step-00000008", whole / "step-00000008")


class StopsBetween(L.Callback):
    """Asks for an end where no step is in the making."""

    def __init__(self, after_epoch: bool) -> None:
        self.after_epoch = after_epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop |= self.after_epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop |= not self.after_epoch and trainer.global_step > 0


@pytest.mark.parametrize("after_epoch", [True, False])
def test_a_stop_between_epochs_is_validated_saved_and_gone_on_from(
    fit: Callable[..., Path], tmp_path: Path, after_epoch: bool
) -> None:
    words = (*EPOCH_OF_FOUR, "--evaluation.steps", "3", "--checkpoint.checkpointing_steps", "100")
    whole = fit(tmp_path / "whole", *words)
    stops = {"class_path": "tests.integration.test_resume.StopsBetween", "init_args": {"after_epoch": after_epoch}}
    part = fit(tmp_path / "part", *words, "--trainer.callbacks", json.dumps([stops]))
    assert checkpoints(part)[-1] == "step-00000004" and metrics(part)[-1]["step"] == "4"
    assert metrics(part)[-1]["val/loss"]
    fit(part, *words, "--trainer.callbacks", "null", "--ckpt_path", "last")
    assert same_weights(part / "step-00000008", whole / "step-00000008")
    ours, theirs = (torch.load(run / "step-00000008" / "trainer.pt", weights_only=True) for run in (part, whole))
    assert str(ours["optimizer_states"]) == str(theirs["optimizer_states"])


def test_best_is_remembered_across_a_resume(fit: Callable[..., Path], tmp_path: Path) -> None:
    """The earlier part's best is kept and found, although the later part only gets worse."""
    run = fit(tmp_path / "run", "--trainer.max_steps", "4", "--model.lr_scheduler_type", "constant")
    worse = (
        "--model.learning_rate",
        "3",
        "--model.lr_scheduler_type",
        "constant",
        "--trainer.gradient_clip_val",
        "null",
    )
    fit(run, *worse, "--trainer.max_steps", "12", "--ckpt_path", "best")
    assert checkpoints(run) == ["step-00000004", "step-00000012"]


def test_last_without_a_checkpoint_starts_at_zero_and_says_so(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path / "run", "--ckpt_path", "last", "--trainer.max_steps", "2")
    assert "starting at step 0" in capsys.readouterr().out
    assert checkpoints(run) == ["step-00000002"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data.total_train_batch_size", "32"), "data.total_train_batch_size was 16, is 32"),
        (
            ("--data.task_sampling", "{temperature: 2}"),
            "data.task_sampling was 'proportional', is {'temperature': 2.0}",
        ),
        (
            ("--data.total_train_batch_size", "null", "--data.total_train_batch_tokens", "999"),
            "batch_tokens was None, is",
        ),
        (("--seed_everything", "7"), "seed_everything was 42, is 7"),
        (("--data.seq_length", "125"), "training conversations was"),
        (("--model.peft_type", "lora"), "holds no adapter"),
    ],
)
def test_resuming_something_else_is_refused(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    run = fit(tmp_path / "run", "--trainer.max_steps", "2")
    assert message in refused(run, *words, "--ckpt_path", "last")


@pytest.mark.parametrize("part", ["training", "validation"])
def test_a_changed_conversation_is_refused(
    fit: Callable[..., Path], refused: Callable[..., str], write_task: Callable[..., str], tmp_path: Path, part: str
) -> None:
    records = [{"prompt": f"What is {number} + 1?", "answer": f"{number + 1}"} for number in range(60)]
    split = split_records(60, parse_shares("90,10,0"), 42, "sums")
    words = ["--data.data_paths", f"[{write_task('sums', records)}]", "--data.data_split", "90,10,0"]
    run = fit(tmp_path / "run", *words, "--trainer.max_steps", "2")
    first = next(number for number, code in enumerate(split) if (code == 0) == (part == "training"))
    records[first]["answer"] = "another answer"
    write_task("sums", records)
    message = refused(run, *words, "--trainer.max_steps", "6", "--ckpt_path", "last")
    assert message.count("(digest) was") == 1 and f"{part} tokens (digest) was" in message
    assert "go on regardless with --checkpoint.allow_changes true. What is lost: " in message


def test_another_tokenizer_is_refused(
    fit: Callable[..., Path], refused: Callable[..., str], tiny_model: Path, tmp_path: Path
) -> None:
    """Though it gives every conversation the same tokens: two bytes that UTF-8 never has are the other way round."""
    run = fit(tmp_path / "run", "--trainer.max_steps", "2")
    other = shutil.copytree(tiny_model, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["ÿ"], vocabulary["þ"] = vocabulary["þ"], vocabulary["ÿ"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    words = ("--model.pretrained_model_path", str(other), "--trainer.max_steps", "3", "--ckpt_path", "last")
    message = refused(run, *words)
    assert re.search(r"another run: tokenizer \(digest\) was '\w+', is '\w+'\. Set them back\.", message)
    assert "--checkpoint.allow_changes true. What is lost: " in message
    fit(run, *words, "--checkpoint.allow_changes", "true")


def test_what_may_change_goes_on_if_allowed_and_says_what_is_lost(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over other data, of other steps an epoch, in other batches; the optimizer goes on as it was."""
    run = fit(tmp_path / "run", *EPOCH_OF_FOUR, "--trainer.max_steps", "6")
    other = ("--seed_everything", "7", "--data.total_train_batch_size", "200", "--data.seq_length", "125")
    words = (*other, "--trainer.max_steps", "14", "--checkpoint.save_total_limit", "null", "--ckpt_path", "last")
    assert "What is lost" in refused(run, *words)
    fit(run, *words, "--checkpoint.allow_changes", "true")
    said = capsys.readouterr().out
    assert "goes on although data.total_train_batch_size was 300, is 200; seed_everything was 42, is 7" in said
    an_epoch = int(re.findall(r"14 \((\d+) an epoch\)", said)[-1])
    assert "What is lost" in said and an_epoch not in (4, 7)
    assert sorted({int(row["step"]) for row in metrics(run)}) == list(range(15))
    assert "allow_changes: false" in (run / "config.yaml").read_text()
    fit(run, *words, "--trainer.max_steps", "16")  # from here on it is this run
    end = torch.load(run / "step-00000016" / "trainer.pt", weights_only=True)["loops"]["fit_loop"]
    completed, rest = divmod(15, an_epoch)
    assert end["epoch_progress"]["current"]["completed"] == completed
    assert end["epoch_loop.batch_progress"]["current"]["processed"] == rest + 1
    refused(run, *words, "--model.peft_type", "lora", "--checkpoint.allow_changes", "true")


def test_a_position_is_set_as_lightning_saves_it(fit: Callable[..., Path], tmp_path: Path) -> None:
    """At every kind of step: within an epoch, at its end, at its first."""
    run = fit(tmp_path / "run", *EPOCH_OF_FOUR, "--checkpoint.checkpointing_steps", "1", *KEEP_ALL[:2])
    for name in checkpoints(run):
        saved = torch.load(run / name / "trainer.pt", weights_only=True)
        moved = deepcopy(saved)
        set_position(moved, 4)
        assert moved["loops"] == saved["loops"] and moved["epoch"] == saved["epoch"], name


def test_a_directory_that_holds_another_run_takes_no_checkpoint_from_elsewhere(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    first = fit(tmp_path / "first", "--trainer.max_steps", "2")
    second = fit(tmp_path / "second", "--trainer.max_steps", "2")
    assert "holds a run already" in refused(second, "--ckpt_path", str(first / "step-00000002"))


def test_an_adapter_goes_with_the_base_it_was_trained_on(
    fit: Callable[..., Path], fit_arguments: Callable[..., list[str]], refused: Callable[..., str], tmp_path: Path
) -> None:
    run = fit(tmp_path / "run", "--trainer.max_steps", "2", config="lora.yaml")
    assert main(["validate", *fit_arguments(run, "--ckpt_path", "last", config="lora.yaml")]) == 0
    other = ("--ckpt_path", "last", "--seed_everything", "7")
    assert "frozen base (digest) was" in refused(run, *other, config="lora.yaml", command="validate")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "the weights cannot be loaded"),
        ("trainer.pt", "trainer.pt: is damaged"),
        ("config.json", "cannot be loaded"),
    ],
)
def test_what_was_damaged_before_it_was_written_is_refused_before_anything_changes(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path, file: str, message: str
) -> None:
    run = fit(tmp_path / "run", "--trainer.max_steps", "2")
    damaged = run / "step-00000002" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    written_again(damaged.parent)
    assert message in refused(run, "--ckpt_path", "last")


def test_a_checkpoint_that_lacks_a_weight_is_not_filled_at_random(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    run = fit(tmp_path / "run", "--trainer.max_steps", "2")
    file = run / "step-00000002" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("gpt_neox.layers.1.mlp.dense_h_to_4h.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    written_again(file.parent)
    for name in ("fit", "validate"):
        assert "lacks 1 weights of the model" in refused(run, "--ckpt_path", "last", command=name)


@pytest.mark.parametrize("content", [{}, [1], {"global_step": 2}, "loops"])
def test_a_trainer_state_that_is_not_whole_is_refused(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path, content: object
) -> None:
    run = fit(tmp_path / "run", "--trainer.max_steps", "2")
    file = run / "step-00000002" / "trainer.pt"
    if content == "loops":
        content = torch.load(file, weights_only=True)
        content.pop("loops")
    torch.save(content, file)
    written_again(file.parent)
    assert "trainer.pt: is damaged" in refused(run, "--ckpt_path", "last")


def test_another_function_over_the_same_weights_is_refused(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    run = fit(tmp_path / "run", "--trainer.max_steps", "2", config="lora.yaml")
    for name in ("fit", "validate"):
        words = ("--model.lora.alpha", "320", "--ckpt_path", "last")
        assert "alpha 32, on" in refused(run, *words, config="lora.yaml", command=name)


def test_adapters_of_another_rank_are_refused(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    run = fit(tmp_path / "run", "--trainer.max_steps", "2", config="lora.yaml")
    words = ("--model.lora.r", "8", "--ckpt_path", "last")
    assert "holds other weights than this run's model" in refused(run, *words, config="lora.yaml")


def test_attention_padding_and_precision_may_change(fit: Callable[..., Path], tmp_path: Path) -> None:
    """They decide how a step is computed, not which."""
    run = fit(tmp_path / "run", "--trainer.max_steps", "2")
    words = ("--model.attn_implementation", "eager", "--data.padding_mode", "padding")
    fit(run, *words, "--trainer.precision", "bf16-mixed", "--ckpt_path", "last", "--trainer.max_steps", "3")
    assert checkpoints(run)[-1] == "step-00000003"


def test_losses_that_are_no_numbers_end_the_run(
    fit_arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model.learning_rate", "1e20", "--trainer.gradient_clip_val", "null", "--model.max_skipped_steps", "4")
    assert main(["fit", *fit_arguments(tmp_path / "run", *words)]) == 1
    said = capsys.readouterr()
    assert "skipped: the losses of all its 16 conversations are not finite" in said.out
    assert "this is skipped step 4 in a row" in said.err


def test_a_changed_patience_counts_after_a_resume(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still = ("--model.learning_rate", "1e-9", "--model.min_lr", "0", "--evaluation.steps", "1")
    still += ("--early_stopping.min_delta", "0.01", "--trainer.max_steps", "12")
    run = fit(tmp_path / "run", *still, "--early_stopping.patience", "1")
    assert checkpoints(run)[-1] == "step-00000002"
    assert "stopped early" in capsys.readouterr().out
    fit(run, *still, "--early_stopping.patience", "1", "--ckpt_path", "last")
    assert checkpoints(run)[-1] == "step-00000002"
    fit(run, *still, "--early_stopping.patience", "4", "--ckpt_path", "last")
    assert checkpoints(run)[-1] == "step-00000005"


def test_a_finished_run_has_nothing_to_do(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path / "run", "--trainer.max_steps", "2")
    before = everything(run)
    fit(run, "--trainer.max_steps", "2", "--ckpt_path", "last")
    assert "nothing to do" in capsys.readouterr().out
    assert everything(run) == before


def test_the_saved_configuration_goes_on_with_the_run(fit: Callable[..., Path], tmp_path: Path) -> None:
    run = fit(tmp_path / "run", "--trainer.max_steps", "2")
    words = ["--config", str(run / "config.yaml"), "--ckpt_path", "last", "--trainer.max_steps", "4"]
    assert main(["fit", *words]) == 0
    assert checkpoints(run)[-1] == "step-00000004"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_validation_and_a_checkpoint(
    fit_arguments: Callable[..., list[str]], tmp_path: Path, signum: signal.Signals
) -> None:
    run = tmp_path / "run"
    words = (
        "--trainer.max_steps",
        "100000",
        "--evaluation.steps",
        "100000",
        "--checkpoint.checkpointing_steps",
        "100000",
    )
    line = [sys.executable, "-m", "mft_lightning", "fit", *fit_arguments(run, *words)]
    with subprocess.Popen(line, cwd=ROOT, env=user_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if text.startswith("step 3/"):
                process.send_signal(signum)
                break
        rest = process.stdout.read()
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
    assert process.returncode == 128 + signum and f"stopped by {signum.name}" in rest, rest
    (name,) = checkpoints(run)
    assert metrics(run)[-1]["val/loss"] and int(metrics(run)[-1]["step"]) == int(name.removeprefix("step-"))
    more = str(int(name.removeprefix("step-")) + 2)
    result = command("fit", *fit_arguments(run, "--trainer.max_steps", more, "--ckpt_path", "last"))
    assert result.returncode == 0, result.stderr
