"""The main job: from a YAML file to curves and checkpoints."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from mft_lightning.cli import main
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.training import callbacks
from tests.integration.conftest import TASKS, checkpoints, command, metrics


@pytest.mark.parametrize("config", ["full.yaml", "lora.yaml"])
@pytest.mark.parametrize("padding_mode", ["pack", "padding"])
def test_loss_falls_and_every_task_has_its_curve(
    fit: Callable[..., Path], tmp_path: Path, config: str, padding_mode: str
) -> None:
    run = fit(tmp_path / "run", "--data.padding_mode", padding_mode, config=config)
    rows = metrics(run)
    validations = [row for row in rows if row["val/loss"]]
    assert [row["step"] for row in validations] == ["0", "4", "8"]
    assert [row["step"] for row in rows if row["train/loss"]] == [str(step) for step in range(1, 9)]
    for task in TASKS:
        assert float(validations[-1][f"val/loss/{task}"]) < float(validations[0][f"val/loss/{task}"]) - 0.05
        loss, perplexity = (float(validations[0][f"val/{kind}/{task}"]) for kind in ("loss", "perplexity"))
        assert perplexity == pytest.approx(math.exp(loss))
    assert float(validations[0]["val/loss"]) == pytest.approx(
        sum(float(validations[0][f"val/loss/{task}"]) for task in TASKS) / 3
    )


def test_tensorboard_has_the_contract_s_tags_at_the_steps_completed(fit: Callable[..., Path], tmp_path: Path) -> None:
    run = fit(tmp_path / "run")
    events = EventAccumulator(str(run / "runs"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {"train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "train/mfu", "val/loss"}
    wanted |= {f"train/{kind}/{task}" for kind in ("loss", "weight") for task in TASKS}
    wanted |= {f"val/{kind}/{task}" for kind in ("loss", "perplexity", "accuracy") for task in TASKS}
    assert wanted <= tags
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("val/loss")] == [0, 4, 8]
    rates = [event.value for event in events.Scalars("train/lr")]
    assert rates[1] == pytest.approx(1e-2) and rates[-1] == pytest.approx(1e-5)


def test_every_logged_step_has_its_share_of_the_devices_speed(fit: Callable[..., Path], tmp_path: Path) -> None:
    run = fit(tmp_path / "run", "--evaluation.strategy", "none", "--trainer.max_steps", "3")
    with (run / "metrics.csv").open(newline="") as handle:
        shares = [float(row["train/mfu"]) for row in csv.DictReader(handle)]
    assert len(shares) == 3 and all(0 < share < 1.5 for share in shares)


def test_nothing_is_measured_where_nobody_reads_it(
    fit: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*given: object) -> float:
        raise AssertionError("the device's speed was measured")

    monkeypatch.setattr(callbacks, "gemm_speed", measured)
    fit(tmp_path / "run", "--evaluation.strategy", "none", "--trainer.max_steps", "1", "--trainer.logger", "false")


def test_validation_is_the_plain_mean_whatever_the_batch_size(
    fit: Callable[..., Path], tiny_model: Path, example_tasks: list[str], tmp_path: Path
) -> None:
    """val/loss of a checkpoint against transformers' own forward, conversation by conversation."""
    run = fit(tmp_path / "run", "--evaluation.max_conversations_per_task", "null")
    checkpoint = run / "step-00000008"
    recorded = json.loads((checkpoint / "checkpoint.json").read_text())["metrics"]
    datamodule = MFTDataModule(data_paths=example_tasks, tokenizer_path=str(tiny_model), seq_length=512)
    table = datamodule.table("valid")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    nll, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for i in range(len(table)):
        ids, mask = (torch.tensor(part.astype("int64")) for part in table.row(i))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        nll[table.tasks[i]] += losses[mask[1:] == 1].sum()
        count[table.tasks[i]] += int(mask.sum())
    assert recorded["val/loss"] == pytest.approx(float((nll / count).mean()), rel=1e-5)
    arguments = ["--config", "full.yaml", "--model.pretrained_model_path", str(tiny_model), "--output_dir", str(run)]
    arguments += ["--data.data_paths", f"[{','.join(example_tasks)}]", "--ckpt_path", str(checkpoint)]
    for size in ("1", "50"):
        result = command("validate", *arguments, "--data.per_device_valid_batch_size", size)
        assert result.returncode == 0, result.stderr
        printed = dict(line.split() for line in result.stdout.splitlines() if line.startswith("val/"))
        assert float(printed["val/loss"]) == pytest.approx(recorded["val/loss"], rel=1e-6)


def test_retention_keeps_best_latest_and_epoch_ends(fit: Callable[..., Path], tmp_path: Path) -> None:
    small = ("--data.total_train_batch_size", "256", "--data.per_device_train_batch_size", "64")
    run = fit(
        tmp_path / "run",
        *small,
        *("--trainer.max_steps", "12", "--checkpoint.extra_save_by_epoch", "true"),
        *("--evaluation.steps", "3", "--checkpoint.checkpointing_steps", "2", "--model.learning_rate", "1e-3"),
    )
    found = {path.name: json.loads((path / "checkpoint.json").read_text()) for path in run.glob("step-*")}
    assert [name for name, about in sorted(found.items()) if about["epoch_end"]] == ["step-00000005", "step-00000010"]
    rotating = [name for name, about in sorted(found.items()) if not about["epoch_end"]]
    assert rotating[-1] == "step-00000012" and len(rotating) <= 2


def test_validation_and_saving_by_epoch(fit: Callable[..., Path], tmp_path: Path) -> None:
    run = fit(
        tmp_path / "run",
        *("--data.total_train_batch_size", "256", "--data.per_device_train_batch_size", "64"),
        *("--trainer.max_steps", "-1", "--trainer.max_epochs", "2", "--checkpoint.save_total_limit", "null"),
        *("--evaluation.strategy", "epoch", "--checkpoint.save_strategy", "epoch", "--evaluation.at_start", "false"),
    )
    assert [row["step"] for row in metrics(run) if row["val/loss"]] == ["5", "10"]
    assert checkpoints(run) == ["step-00000005", "step-00000010"]


def test_without_validation_a_run_still_ends_with_a_checkpoint(fit: Callable[..., Path], tmp_path: Path) -> None:
    run = fit(
        tmp_path / "run",
        *("--evaluation.strategy", "none", "--checkpoint.checkpointing_steps", "100", "--trainer.max_steps", "3"),
    )
    assert "val/loss" not in metrics(run)[0] and checkpoints(run) == ["step-00000003"]


def test_early_stopping_counts_validations_and_leaves_a_checkpoint(fit: Callable[..., Path], tmp_path: Path) -> None:
    run = fit(
        tmp_path / "run",
        *("--trainer.max_steps", "40", "--model.learning_rate", "1e-9", "--model.num_warmup_steps", "0"),
        *("--model.min_lr", "0", "--evaluation.steps", "1", "--early_stopping.patience", "2"),
        *("--early_stopping.min_delta", "0.01"),
    )
    assert [row["step"] for row in metrics(run) if row["val/loss"]] == ["0", "1", "2", "3"]
    assert checkpoints(run)[-1] == "step-00000003"


def test_a_time_limit_ends_with_validation_and_checkpoint(fit: Callable[..., Path], tmp_path: Path) -> None:
    run = fit(
        tmp_path / "run",
        *("--trainer.max_steps", "100000", "--trainer.max_time", "00:00:00:02"),
        *("--evaluation.steps", "100000", "--checkpoint.checkpointing_steps", "100000"),
    )
    last = int(metrics(run)[-1]["step"])
    assert 0 < last < 100000
    assert metrics(run)[-1]["val/loss"] and checkpoints(run) == [f"step-{last:08d}"]


def test_separate_validation_paths_and_an_excluded_task(
    fit: Callable[..., Path], example_tasks: list[str], tmp_path: Path
) -> None:
    valid = [shutil.copytree(task, tmp_path / "valid" / Path(task).name) for task in example_tasks[1::-1]]
    run = fit(
        tmp_path / "run",
        *("--data.data_split", "null", "--data.valid_data_paths", f"[{valid[0]},{valid[1]}]"),
        *("--evaluation.exclude_tasks", "[unit_tests]", "--trainer.max_steps", "2"),
    )
    row = metrics(run)[0]
    assert float(row["val/loss"]) == pytest.approx(
        (float(row["val/loss/text_to_code"]) + float(row["val/loss/code_explanation"])) / 2
    )
    assert "val/loss/unit_tests" not in row


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16(fit: Callable[..., Path], tmp_path: Path, precision: str) -> None:
    run = fit(tmp_path / "run", "--trainer.precision", precision)
    losses = [float(row["val/loss"]) for row in metrics(run) if row["val/loss"]]
    assert losses[-1] < losses[0] - 0.1
    held = torch.bfloat16 if precision == "bf16-true" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(run / "step-00000008", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {held}


def test_a_profiler_that_was_asked_for_reports(fit_arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    words = ("--trainer.profiler", "simple", "--trainer.max_steps", "1")
    result = command("fit", *fit_arguments(tmp_path / "run", *words))
    assert "run_training_batch" in result.stdout + result.stderr and "GPU available" not in result.stderr


def test_torchs_profiler_sees_what_is_computed_without_it(fit: Callable[..., Path], tmp_path: Path) -> None:
    words = ("--trainer.max_steps", "6", "--evaluation.strategy", "none", "--checkpoint.checkpointing_steps", "1000")
    run = fit(tmp_path / "run", *words, "--trainer.profiler", "pytorch")
    (trace,) = (run / "runs").glob("*.pt.trace.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "_LinearHeadLoss" in names and not any("lm_head" in str(name) for name in names)


@pytest.mark.parametrize("config", ["full.yaml", "lora.yaml", "quickstart.yaml", "pretrain.yaml", "coba.yaml"])
def test_shipped_configs_run_as_they_are(tmp_path: Path, config: str) -> None:
    words = ("--output_dir", str(tmp_path / "run"), "--trainer.max_steps", "1")
    result = command("fit", "--config", config, *words, "--evaluation.max_conversations_per_task", "2")
    assert result.returncode == 0, result.stderr
    assert checkpoints(tmp_path / "run") == ["step-00000001"]
    assert "trainable parameters" in result.stdout and "step 1/1" in result.stdout


@pytest.mark.parametrize("config", ["full.yaml", "lora.yaml"])
def test_the_real_corpus_with_the_real_tokenizer(
    real_tasks: list[str], pythia: Path, tmp_path: Path, config: str
) -> None:
    """Narrow layers under the real vocabulary, so that it takes seconds; the original's string form of the paths."""
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    for file in pythia.iterdir():
        (narrow / file.name).write_bytes(file.read_bytes())
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    about = json.loads((narrow / "config.json").read_text()) | shape
    (narrow / "config.json").write_text(json.dumps(about))
    run = tmp_path / "run"
    arguments = ["fit", "--config", config, "--output_dir", str(run), "--data.data_paths", f"[{','.join(real_tasks)}]"]
    arguments += ["--model.pretrained_model_path", str(narrow), "--data.seq_length", "2048", "--trainer.max_steps", "6"]
    arguments += [
        "--data.total_train_batch_size",
        "16",
        "--model.learning_rate",
        "3e-3",
        "--model.num_warmup_steps",
        "2",
    ]
    arguments += ["--evaluation.max_conversations_per_task", "3", "--trainer.log_every_n_steps", "1"]
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    assert "1 overlong" in result.stdout
    losses = [float(row["val/loss"]) for row in metrics(run) if row["val/loss"]]
    assert losses[-1] < losses[0] - 0.01
    assert AutoTokenizer.from_pretrained(run / "step-00000006").pad_token == "<|padding|>"


def test_print_config_and_help_name_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["fit", "--help"], ["fit", "--config", "lora.yaml", "--print_config"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        assert "seq_length" in capsys.readouterr().out
