"""A run tells what will happen, how far it is, and what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mft_lightning.cli import main
from tests.integration import preloaded
from tests.integration.conftest import TASKS, checkpoints, metrics, read_terminal, user_environment

ALWAYS_WORSE = ("--early_stopping.min_delta", "100")


def cells(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


def table(printed: str, first: str) -> dict[str, dict[str, str]]:
    """The rows of the first table after the line ``first``, by task and column."""
    lines = printed[printed.index(first) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("task "))
    columns = cells(lines[start])
    rows = [cells(line) for line in lines[start + 1 : start + 1 + len(TASKS)]]
    return {row[0]: dict(zip(columns, row, strict=True)) for row in rows}


def labels(printed: str) -> dict[str, str]:
    return {row[0]: row[1] for line in printed.splitlines() if len(row := cells(line)) == 2}


def on_a_terminal(words: list[str], columns: int = 120) -> str:
    """What a command writes to a terminal, and that it ends well."""
    mine, theirs = pty.openpty()
    environment = {**user_environment(), "TERM": "xterm-256color", "COLUMNS": str(columns)}
    process = preloaded.start(["-m", "mft_lightning", *words], environment, theirs, theirs, theirs)
    os.close(theirs)
    written = read_terminal(mine)
    assert preloaded.exit_code(process) == 0, written
    return written


def test_the_start(fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path / "run", "--trainer.max_steps", "2", "--data.seq_length", "130")
    printed = capsys.readouterr().out.split("step 0/2")[0]
    rows = table(printed, "")
    assert rows["unit_tests"]["train"] == "228" and rows["unit_tests"]["valid"] == "12"
    assert rows["unit_tests"]["tokens"] == "19,472" and rows["unit_tests"]["supervised"] == "47.0%"
    assert "overlong" in rows["code_explanation"]["left out"] and "part_0.jsonl" in printed
    said = labels(printed)
    assert said["parameters"].endswith("(100.00%)") and "trainable" in said["parameters"]
    assert "16 conversations a step = 2 micro-batch(es) of 8" in said["batch"] and "130 tokens" in said["batch"]
    assert said["steps"].startswith("2 (") and "warm-up 2" in said["steps"] and "cosine" in said["steps"]
    assert said["device"] == "1 x cpu, precision 32-true" and said["output"] == str(tmp_path / "run")
    assert said["loss"].startswith("case3: tasks count alike") and "sampling" not in said
    assert re.fullmatch(r"about 0\.0\d GiB of tensors in a step, of \d+\.\d GiB for each process", said["memory"])


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_more_loader_processes_than_cores_are_told_once(
    fit_arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    command: str,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})  # torch looks there too
    words = ("--data.num_workers", "2", *(("--dry_run",) if command == "fit" else ()))
    assert main([command, *fit_arguments(tmp_path / "run", *words)]) == 0
    assert capsys.readouterr().out.count("note: data.num_workers: 2 processes load batches, more than the 1 core") == 1
    assert not [one for one in recwarn if "worker processes" in str(one.message)]


def test_a_run_that_does_not_fit_is_told_so_before_it_tries(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mft_lightning.commands.step_memory._memory", lambda trainer: 1000)
    fit(tmp_path / "run", "--trainer.max_steps", "1")
    printed = capsys.readouterr().out
    notes = [line for line in printed.splitlines() if line.startswith("note: memory: ")]
    assert len(notes) == 1 and printed.index(notes[0]) < printed.index("step 0/1")
    assert "What needs less: python -m mft_lightning estimate --config" in notes[0]


def test_the_start_of_a_run_by_tokens_at_rates(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = ("--data.total_train_batch_size", "null", "--data.total_train_batch_tokens", "2000")
    rates = ("--data.task_sampling", "{text_to_code: 1, code_explanation: 2, unit_tests: 1}")
    fit(tmp_path / "run", *tokens, *rates, "--trainer.max_steps", "2")
    said = labels(capsys.readouterr().out)
    filled = re.match(
        r"up to 2,000 tokens a step \((\d\d\.\d)% filled\), \d\d\.\d conversations on average, in micro-batches of 8, ",
        said["batch"],
    )
    assert filled and 97 <= float(filled[1]) <= 100
    assert said["sampling"].split(", ")[0] == "text_to_code 25.0% (0.52 times an epoch)"
    assert "code_explanation 50.0% (1.56 times an epoch)" in said["sampling"]
    assert re.search(r", [\d,]+ draws an epoch of [\d,]+, so that its steps are full, ", said["sampling"])
    assert re.search(r", [\d,]+ of [\d,]+ draws left out of the first epoch for want of room$", said["sampling"])
    again = ("--ckpt_path", "last", "--data.padding_mode", "padding")
    again += ("--data.per_device_train_batch_size", "null", "--data.gradient_accumulation_steps", "2")
    fit(tmp_path / "run", *tokens, *rates, *again, "--trainer.max_steps", "4")
    said = labels(capsys.readouterr().out)
    assert ", in 2 micro-batch(es), padded rows" in said["batch"] and "step-00000002" in said["output"]


def test_sampling_from_a_file_is_kept_in_the_file_that_is_written(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mixed.yaml"
    config.write_text("data:\n  task_sampling: {temperature: 2}\n")
    run = fit(tmp_path / "run", "--config", str(config), "--trainer.max_steps", "1")
    first = labels(capsys.readouterr().out)["sampling"]
    fit(tmp_path / "again", "--config", str(run / "config.yaml"), "--output_dir", str(tmp_path / "again"))
    assert labels(capsys.readouterr().out)["sampling"] == first and "times an epoch" in first


def test_names_that_look_like_numbers_are_names_in_the_file_that_is_written(
    fit: Callable[..., Path], write_task: Callable[..., str], tmp_path: Path
) -> None:
    names = ["1e3", "5E2", "2024", "no", "1.5e-3", "0x1f", "é"]
    tasks = [write_task(name, [{"prompt": f"{name} {n}", "answer": "a"} for n in range(30)]) for name in names]
    rates = json.dumps(dict.fromkeys(names, 1))
    words = ["--data.data_paths", json.dumps(names), "--data.task_sampling", rates, "--trainer.max_steps", "1"]
    with contextlib.chdir(Path(tasks[0]).parent):
        run = fit(tmp_path / "run", *words)
        again = ["--config", str(run / "config.yaml"), "--ckpt_path", "last", "--trainer.max_steps", "2"]
        assert main(["fit", *again]) == 0


def test_plain_lines_tell_the_time_left(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path / "run")
    printed = capsys.readouterr().out
    lines = re.findall(r"^step (\d)/8  loss .* tokens/s(?:  \d:\d\d left)?$", printed, re.MULTILINE)
    assert lines == ["1", "2", "3", "4", "5", "6", "7", "8"]
    first, rows = re.search(r"^step 1/8  loss .* \((.*)\)  lr ", printed, re.MULTILINE), metrics(tmp_path / "run")
    assert first and first[1].split("  ") == [
        f"{task} {float(rows[1][f'train/loss/{task}']):.4f}" for task in TASKS if rows[1][f"train/loss/{task}"]
    ]
    assert len(re.findall(r"\d:\d\d left$", printed, re.MULTILINE)) == 7 and "\x1b" not in printed


@pytest.mark.parametrize("config", ["full.yaml", "lora.yaml"])
def test_the_end(fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str) -> None:
    run = fit(tmp_path / "run", "--evaluation.exact_match_per_task", "2", config=config)
    printed = capsys.readouterr().out
    assert re.search(r"^trained to step 8 of 8 \(0\.1 epochs\) in \d:\d\d$", printed, re.MULTILINE)
    rows = table(printed, "validation at step 8")
    logged = [row for row in metrics(run) if row["val/loss"]]
    for task in TASKS:
        row = rows[task]
        assert row["conversations"] == "6" and int(row["supervised tokens"]) > 100
        assert float(row["loss before"]) == pytest.approx(float(logged[0][f"val/loss/{task}"]), abs=1e-4)
        assert float(row["loss"]) == pytest.approx(float(logged[-1][f"val/loss/{task}"]), abs=1e-4)
        assert float(row["perplexity"]) == pytest.approx(float(logged[-1][f"val/perplexity/{task}"]), abs=1e-4)
        assert row["token accuracy"] == f"{float(logged[-1][f'val/accuracy/{task}']):.1%}"
        assert row["exact match"] == ("0 of 4" if task == "code_explanation" else "0 of 2")
    assert metrics(run)[-1]["val/exact_match/unit_tests"] == "0.0"
    said = labels(printed.split("validation at step 8")[1])
    assert said["last checkpoint"] == str(run / "step-00000008")
    assert said["best checkpoint"].startswith(str(run / "step-00000008") + " (val/loss ")
    assert ("merge" in said) == (config == "lora.yaml")
    assert said["curves"].endswith(f"tensorboard --logdir {run / 'runs'}")


def test_the_commands_it_ends_with_can_be_typed(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path / "my run", "--trainer.max_steps", "2", config="lora.yaml")
    said = labels(capsys.readouterr().out)
    for label in ("ask it", "merge", "go on"):
        words = shlex.split(said[label])
        assert words[1:3] == ["-m", "mft_lightning"]
        environment = {**user_environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        assert shutil.which(words[0], path=environment["PATH"])
        result = preloaded.run(words[1:], environment)
        assert result.returncode == 0, result.stderr
    assert (run / "merged-step-00000002" / "model.safetensors").is_file()
    assert (run / "step-00000004").is_dir()


def test_after_an_early_stop_more_patience_goes_on(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = ("--model.learning_rate", "1e-9", "--model.num_warmup_steps", "0", "--model.min_lr", "0")
    slow += ("--evaluation.steps", "1", "--early_stopping.min_delta", "0.01")
    run = fit(tmp_path / "run", *slow, "--early_stopping.patience", "1")
    printed = capsys.readouterr().out
    assert "stopped early" in printed and re.search(r"trained to step \d of 8", printed)
    words = shlex.split(labels(printed)["go on"])
    assert words[-2:] == ["--early_stopping.patience", "2"]
    stopped = max(checkpoints(run))
    assert main(words[3:]) == 0
    assert max(checkpoints(run)) > stopped


@pytest.mark.parametrize(
    "words",
    [
        ("--trainer.max_steps", "2", "--trainer.max_epochs", "1", "--data.total_train_batch_size", "600"),
        ("--trainer.max_steps", "-1", "--trainer.max_epochs", "1", "--data.total_train_batch_size", "600"),
        ("--trainer.max_steps", "1", "--evaluation.steps", "1", "--early_stopping.patience", "1", *ALWAYS_WORSE),
        ("--trainer.max_steps", "100000", "--trainer.max_time", "00:00:00:01"),
    ],
    ids=["both limits", "epochs", "patience and steps", "time"],
)
def test_going_on_goes_on(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    run = fit(tmp_path / "run", *words, "--data.per_device_train_batch_size", "8")
    ended = max(checkpoints(run))
    line = shlex.split(labels(capsys.readouterr().out)["go on"])[3:]
    if "--trainer.max_time" in words:
        assert line[-2:] == ["--trainer.max_time", "null"]
        line += ["--trainer.max_steps", str(int(ended.removeprefix("step-")) + 1)]
    assert main(line) == 0
    assert max(checkpoints(run)) > ended


def test_a_run_that_had_ended_shows_its_table_again(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = ("--evaluation.steps", "1", "--early_stopping.patience", "1", *ALWAYS_WORSE)
    run = fit(tmp_path / "run", *slow)
    first = capsys.readouterr().out.split("validation at")[1]
    fit(run, *slow, "--ckpt_path", "last")
    again = capsys.readouterr().out.split("validation at")[1]
    losses = [[row["loss"] for row in table(printed, "task ").values()] for printed in (first, again)]
    assert losses[0] == losses[1]


def test_what_there_is_not_is_not_told(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path / "run", "--trainer.logger", "false", "--checkpoint.save_total_limit", "1")
    said = labels(capsys.readouterr().out)
    assert "curves" not in said, said["curves"]
    assert "best checkpoint" not in said and said["best kept"]


def test_sigterm_while_answering_ends_the_asking(fit_arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    words = fit_arguments(tmp_path / "run", "--trainer.max_steps", "2", "--evaluation.exact_match_per_task", "1000")
    words += ["--data.data_split", "50,50,0", "--evaluation.max_conversations_per_task", "null"]
    ours, theirs = os.pipe()
    with os.fdopen(ours) as output:
        process = preloaded.start(["-m", "mft_lightning", "fit", *words], user_environment(), 0, theirs, 2)
        os.close(theirs)
        for said in output:
            if said.startswith("answering"):
                process.terminate()
                break
        rest = output.read()
    assert preloaded.exit_code(process) == 128 + signal.SIGTERM and "trained to step 2 of 2" in rest
    assert rest.rstrip().endswith("stopped by SIGTERM when all steps were done")
    asked = re.findall(r"\d+ of (\d+)", rest[rest.index("validation at") :])  # none of a task that was not begun
    assert sum(map(int, asked)) < 400


def test_without_validation_there_is_no_table(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path / "run", "--evaluation.strategy", "none", "--trainer.max_steps", "2")
    printed = capsys.readouterr().out
    assert "trained to step 2 of 2" in printed and "validation at" not in printed and "best" not in printed
    config = str(tmp_path / "run" / "config.yaml")
    words = ["validate", "--config", config, "--ckpt_path", "last", "--evaluation.exact_match_per_task", "1"]
    assert main(words) == 0
    assert "0 of 2" in capsys.readouterr().out


def test_a_terminal_sees_a_bar_over_the_whole_run(fit_arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    words = fit_arguments(tmp_path / "run", "--evaluation.exact_match_per_task", "1")
    written = on_a_terminal(["fit", *words])
    assert re.search(r"step .*\u2501.* 8/8 .*loss \d\.\d{4}  [\d,]+ tokens/s  \d:\d\d left", written)
    assert "validating before the first step" in written
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert [*re.findall(r"step (\d)/8  val/loss", plain)] == ["0", "4", "8"]
    assert "grad norm" not in plain
    narrow = on_a_terminal(["fit", *fit_arguments(tmp_path / "narrow")], columns=50)
    assert "\u2501" not in narrow and re.search(r"step .*8/8 .*loss \d\.\d{4}  [\d,]+ tokens/s  \d:\d\d left", narrow)
    lines = on_a_terminal(["fit", *fit_arguments(tmp_path / "two", "--trainer.enable_progress_bar", "false")])
    assert "\u2501" not in lines and "grad norm" in lines


def test_beside_a_bar_warnings_go_where_standard_error_was_sent(
    fit_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    mine, theirs = pty.openpty()
    words = fit_arguments(tmp_path / "run", "--trainer.max_steps", "4")
    script = "import sys; from mft_lightning.cli import main\n"
    script += "from mft_lightning.training.callbacks import StepLogging as S; old = S.on_train_batch_end\n"
    script += "S.on_train_batch_end = lambda *a: (print('told', file=sys.stderr), old(*a))[1]\n"
    script += f"sys.exit(main(['fit', *{words!r}]))"
    (tmp_path / "told.py").write_text(script)
    environment = {**user_environment(), "TERM": "xterm-256color"}
    errors = tmp_path / "errors"
    with errors.open("w") as handle:
        process = preloaded.start([str(tmp_path / "told.py")], environment, theirs, theirs, handle.fileno())
        os.close(theirs)
        written = read_terminal(mine)
        assert preloaded.exit_code(process) == 0
    assert "\u2501" in written and errors.read_text().count("told") == 4 and "told" not in written


def test_a_bar_can_be_asked_for_where_there_is_no_terminal(
    fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path / "run", "--trainer.enable_progress_bar", "true", "--trainer.max_steps", "2")
    printed = capsys.readouterr().out
    assert "2/2" in printed and "grad norm" not in printed
