"""Bad input ends with one clear message and exit code 1, before anything is written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mft_lightning.cli import main
from tests.integration.conftest import ROOT, command, user_environment

GOOD = {"prompt": "What is 1 + 1?", "answer": "2"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data.data_paths", "[gone]"), "gone is not a directory"),
        (("--data.data_split", "95,5"), "data.data_split: '95,5' is not three percentages"),
        (("--data.data_split", "100,0,0"), "no conversation to evaluate (valid)"),
        (("--data.seq_lenght", "5"), "data.seq_lenght: there is no such key. The nearest is data.seq_length."),
        (("--data.max_evaluation_conversations", "4"), "follows evaluation.max_conversations_per_task. Set it there."),
        (("--conifg", "lora.yaml"), "conifg: there is no such key. The nearest is config."),
        (("--config", "lroa"), "The nearest is lora.yaml."),
        (("--config", "configs/lroa.yaml"), "there is no such file. The nearest is configs/lora.yaml."),
        (("lora.yaml",), "lora.yaml: belongs to no option. Give a file with keys as --config lora.yaml."),
        (("--checkpoint.monitor", "val_loss"), "The nearest is val/loss. See docs/checkpoints.md."),
        (("--model.lora.init", "pisa"), "The nearest is pissa. See docs/training.md#lora-and-its-relatives."),
        (("--evaluation.exclude_tasks", "[unit_test]"), "The nearest is unit_tests. See docs/training.md#validation."),
        (("--learning_rate", "1"), "learning_rate: there is no such key. Here it is model.learning_rate."),
        (
            ("--lr", "1"),
            "lr: there is no such key. Here it is model.learning_rate. See docs/training.md#learning-rate.",
        ),
        (("--data.seq_length", "many"), "data.seq_length"),
        (("--model.peft_type", "lorra"), "model.peft_type"),
        (("--data.gradient_accumulation_steps", "3"), "data.gradient_accumulation_steps is 3"),
        (("--data.total_train_batch_size", "0"), "data.total_train_batch_size: 0"),
        (("--trainer.accumulate_grad_batches", "2"), "Use data.gradient_accumulation_steps"),
        (("--trainer.val_check_interval", "2"), "Use evaluation.steps"),
        (("--trainer.max_steps", "-1"), "trainer.max_epochs: give it or trainer.max_steps"),
        (("--trainer.precision", "16-true"), "trainer.precision: '16-true' is refused; it takes one of"),
        (("--trainer.strategy", "ddp_spawn"), "a Strategy by its class_path. Here it is ddp. See docs/parallel.md."),
        (("--trainer.strategy", "fsdp", "--trainer.precision", "16-mixed"), "trainer.precision: 16-mixed"),
        (("--trainer.strategy", "DDPStrategy"), "Write it as trainer.strategy.class_path. See docs/parallel.md."),
        (("--trainer.precision", "fp16"), "or null. Here it is 16-mixed. See docs/training.md#models."),
        (
            ("--trainer.devices", "two"),
            "trainer.devices: 'two' is refused; of cpu it takes a number from 1 on, or auto.",
        ),
        (("--parallel.cpu_offload", "true"), "parallel.cpu_offload: is an option of trainer.strategy: fsdp"),
        (("--parallel.tensor_parallel_size", "0"), "parallel.tensor_parallel_size: 0 is less than 1"),
        (("--parallel.tensor_parallel_size", "2"), "2 does not divide the 1 device(s) of trainer.devices"),
        (
            ("--parallel.tensor_parallel_size", "2", "--trainer.devices", "2", "--trainer.strategy", "ddp"),
            "parallel.tensor_parallel_size: is an option of trainer.strategy: fsdp",
        ),
        (
            ("--parallel.tensor_parallel_size", "3", "--trainer.devices", "3"),
            "parallel.tensor_parallel_size: 3 does not divide the model's num_attention_heads",
        ),
        (("--parallel.find_unused_parameters", "true"), "parallel.find_unused_parameters: is an option of"),
        (("--data.padding_mode", "concat"), "data.padding_mode: concat cuts a stream"),
        (("--data.cache_dir", ""), "data.cache_dir: is empty"),
        (("--data.cache_dir", "/dev/null/x"), "data.cache_dir: /dev/null/x/"),
        (("--data.preprocessing_num_workers", "0"), "data.preprocessing_num_workers: 0 is less than 1"),
        (("--data.data_paths", "[~nobody-of-this-name/x]"), "~nobody-of-this-name/x is not a directory"),
        (("--data.data_paths", f"[{'a' * 300}]"), "is not a directory that can be read (File name too long)"),
        (("--data.total_train_batch_tokens", "9"), "data.total_train_batch_size: 16 both say how much a step holds"),
        (("--data.total_train_batch_tokens", "0"), "data.total_train_batch_tokens: 0 is less than 1"),
        (("--data.task_sampling", "{temperature: 0}"), "data.task_sampling: 0.0 is no temperature"),
        (("--data.task_sampling", "uniform"), "data.task_sampling: 'uniform' is neither proportional"),
        (("--data.task_sampling", "[1, 2]"), "data.task_sampling: [1.0, 2.0] is not one positive number for each"),
        (("--data.task_sampling", "[1, 1, 1e-9]"), "draws nothing of unit_tests in an epoch of 1,178 conversations"),
        (("--model.qlora.bits", "8"), "model.qlora: is set, but model.peft_type is not qlora"),
        (("--model.coba.tau", "1"), "model.coba: is set, but model.weighted_loss_mode is case3"),
        (("--model.famo.learning_rate", "0"), "model.famo.learning_rate: 0.0 is no number above 0"),
        (
            ("--model.weighted_loss_mode", "famo", "--data.task_weights", "[1, 2, 3]"),
            "data.task_weights: model.weighted",
        ),
        (("--model.label_smoothing", "1"), "model.label_smoothing: 1.0 is not in [0, 1)"),
        (("--model.max_skipped_steps", "0"), "model.max_skipped_steps: 0 is less than 1"),
        (("--model.pretrained_model_path", "./gone"), "no such directory: ./gone"),
        (("--model.init", "pretrained"), "For a model without weights set model.init: random"),
        (("--model.min_lr", "1"), "model.min_lr"),
        (("--data.eos_token", "</s>"), "data.eos_token: '</s>' is not a token"),
        (("--data.task_weights", "[1, 2]"), "data.task_weights"),
        (("--checkpoint.monitor", "val/los"), "checkpoint.monitor: 'val/los' is none of val/loss"),
        (("--early_stopping.patience", "2", "--evaluation.strategy", "none"), "early_stopping.patience"),
        (("--evaluation.exclude_tasks", "[cooking]"), "evaluation.exclude_tasks"),
        (("--ckpt_path", "best"), "--ckpt_path best: no checkpoint"),
        (("--ckpt_path", "gone"), "--ckpt_path gone: is no directory"),
        (("--seed_everything", "true"), "seed_everything"),
        (("--seed_everything", "99999999999"), "seed_everything"),
        (("--trainer.log_every_n_steps", "0"), "trainer.log_every_n_steps: 0"),
        (("--trainer.max_steps", "0"), "trainer.max_steps: 0"),
        (("--trainer.max_time", "soon"), "trainer.max_time: 'soon'"),
        (("--trainer.gradient_clip_val", "-1"), "trainer.gradient_clip_val"),
        (("--trainer.limit_train_batches", "3"), "Use trainer.max_steps"),
        (
            ("--trainer.sync_batchnorm", "true"),
            "trainer.sync_batchnorm: True has no effect here. Use nothing (the mode",
        ),
        (("--data.num_workers", "-1"), "data.num_workers"),
        (("--data.max_skipped_share", "7"), "data.max_skipped_share"),
        (("--model.adam_beta1", "1.5"), "model.adam_beta1: 1.5"),
        (("--model.weight_decay", "-1"), "model.weight_decay: -1"),
        (("--model.lr_num_cycles", "0"), "model.lr_num_cycles"),
        (("--model.weight_decay", ".nan"), "model.weight_decay"),
        (("--model.learning_rate", ".inf"), "model.learning_rate"),
        (("--trainer.gradient_clip_val", ".nan"), "trainer.gradient_clip_val"),
        (
            ("--trainer.accelerator", "nonsense"),
            "trainer.accelerator: 'nonsense' is refused; it takes one of auto, cpu",
        ),
        (("--trainer.profiler", "simpel"), "trainer.profiler: 'simpel' is refused; it takes one of simple, advanced"),
        (
            ("--trainer.gradient_clip_algorithm", "value"),
            "trainer.gradient_clip_algorithm: 'value' is refused; it takes",
        ),
        (("--trainer.max_time", "12:00"), "trainer.max_time: '12:00' is no duration. Write it as '00:12:00:00', which"),
        (("--model.lora.alpha", "0"), "model.lora.alpha"),
        (("--model.lora.target_modules", "[]"), "model.lora.target_modules"),
        (("--model.lora.r", "4"), "model.lora: is set, but model.peft_type is null"),
        (("--early_stopping.patience", "0"), "early_stopping.patience"),
        (("--evaluation.strategy", "none", "--checkpoint.monitor", "val/loss/unit_tests"), "checkpoint.monitor"),
        (
            ("--evaluation.exclude_tasks", "[text_to_code, code_explanation, unit_tests]"),
            "evaluation.exclude_tasks: leaves no task",
        ),
    ],
)
def test_a_setting_that_cannot_work(
    refused: Callable[..., str],
    tmp_path: Path,
    words: tuple[str, ...],
    message: str,
) -> None:
    assert message in refused(tmp_path / "run", *words)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("data: {data_paths: [no, a, 1e3]}", "data.data_paths: YAML reads names as False, 1000.0. Put them in quotes."),
        ("data: {data_paths: 2024}", "data.data_paths: YAML reads a name as 2024. Put it in quotes."),
        (
            "data: {valid_data_paths: [~]}",
            "data.valid_data_paths (names.yaml:1): YAML reads a name as None. Put it in quotes.",
        ),
        (
            "evaluation: {exclude_tasks: [a, on]}",
            "evaluation.exclude_tasks (names.yaml:1): YAML reads a name as True. Put it in quotes.",
        ),
        (
            "data: {data_paths: [[a], no]}",
            "data.data_paths: [['a'], False] is refused; it takes text, or a list of text.",
        ),
        (
            "evaluation: {exclude_tasks: no}",
            "evaluation.exclude_tasks (names.yaml:1): false is refused; it takes a list of text.",
        ),
        (
            "data: {task_weights: {no: 1}}",
            "data.task_weights (names.yaml:1): YAML reads a name as False. Put it in quotes.",
        ),
    ],
)
def test_names_that_yaml_reads_as_something_else(
    refused: Callable[..., str], tmp_path: Path, written: str, message: str
) -> None:
    (tmp_path / "names.yaml").write_text(written)
    assert message in refused(tmp_path / "run", "--config", str(tmp_path / "names.yaml"))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([GOOD, '{"prompt": "cut o'], "part.jsonl:2: is not valid JSON"),
        ([GOOD, "", {"prompt": "no answer"}], "part.jsonl:3: answer: is missing"),
        ([{"chat_rounds": [{"role": "narrator", "content": "x"}]}], "part.jsonl:1: chat_rounds[0].role: 'narrator'"),
        (["[1, 2]"], "part.jsonl:1: is a JSON list, not an object"),
        ([{"text": "plain"}], "part.jsonl:1: text: has no bot turn"),
        ([""], "is empty"),
    ],
)
def test_a_bad_line_is_named(
    refused: Callable[..., str],
    write_task: Callable[..., str],
    tmp_path: Path,
    records: list[object],
    message: str,
) -> None:
    words = ("--data.data_paths", f"[{write_task('broken', records)}]")
    assert message in refused(tmp_path / "run", *words)


def test_bad_lines_are_counted_when_skipped(
    fit: Callable[..., Path], write_task: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records: list[object] = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)]
    records[7], records[9] = "not json", {"prompt": "x" * 5000, "answer": "too long"}
    words = ("--data.on_bad_record", "skip", "--trainer.max_steps", "1")
    fit(tmp_path / "run", "--data.data_paths", f"[{write_task('sums', records)}]", *words)
    printed = capsys.readouterr().out
    assert "1 invalid-json, 1 overlong" in printed and "part.jsonl:8" in printed and "part.jsonl:10" in printed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architectures": ["GPTNeoXForSequenceClassification"]}, "no causal language model"),
        ({"hidden_size": 64, "num_attention_heads": 6}, " contradicts itself (ValueError: The hidden size is not div"),
    ],
)
def test_a_model_that_cannot_be_trained(
    refused: Callable[..., str], tmp_path: Path, tiny_model: Path, changed: dict[str, object], message: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    about = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(about | changed))
    words = ("--model.pretrained_model_path", str(model))
    assert message in refused(tmp_path / "run", *words)


def test_an_output_directory_that_is_a_file(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(tmp_path / "file" / "run")


def test_curves_of_two_runs_are_not_mixed(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    words = ("--tensorboard_dir", str(tmp_path / "curves"), "--trainer.max_steps", "1")
    fit(tmp_path / "run", *words)
    assert "holds another run's curves" in refused(tmp_path / "two", *words)


def test_an_output_directory_that_holds_a_run(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    message = refused(fit(tmp_path / "run", "--trainer.max_steps", "1"))
    assert "--ckpt_path last" in message and "--output_dir" in message


def test_the_process_exits_with_1_and_one_message() -> None:
    line = [sys.executable, "-m", "mft_lightning", "fit", "--config", "lora.yaml", "--data.seq_lenght", "5"]
    result = subprocess.run(line, cwd=ROOT, env=user_environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 1
    message = "data.seq_lenght: there is no such key. The nearest is data.seq_length. See docs/data.md."
    assert result.stderr == f"error: {message}\n"
    assert command("merge", "--adapter", "x").returncode == 1
    assert command("no-such-command").returncode == 1
    assert command("generate", "--model", "gone", "--prompt", "x").returncode == 1


def test_verbose_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "lora.yaml", "--data.data_paths", "[gone]", "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_key_that_is_missing_is_named_with_its_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--model.pretrained_model_path", "examples/model"]) == 1
    assert capsys.readouterr().err.startswith("error: data.data_paths: is missing. Give it in a --config file")
