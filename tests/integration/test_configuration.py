"""Configuration as users meet it: files that compose, variables, printed keys, the schema, a run only checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mft_lightning.cli import main
from tests.integration.conftest import ROOT, checkpoints, everything

Printed = Callable[..., dict[str, dict[str, object]]]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    """The keys of a run, as ``--print_config`` prints them."""

    def run(*words: str) -> dict[str, dict[str, object]]:
        with pytest.raises(SystemExit) as end:
            main(["fit", *words, "--print_config"])
        assert end.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    return run


def test_files_compose_key_by_key_and_the_later_one_counts(printed: Printed, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("data: {data_paths: [a], seq_length: 64}\nmodel: {lora: {r: 8}}\n")
    (tmp_path / "more.yaml").write_text("data: {seq_length: 128}\ntrainer: {callbacks: null}\n")
    files = [word for name in ("mine", "more") for word in ("--config", str(tmp_path / f"{name}.yaml"))]
    keys = printed("--config", "lora.yaml", *files, "--data.data_split", "100,0,0")
    shipped = yaml.safe_load((ROOT / "configs" / "lora.yaml").read_text())
    assert keys["data"]["data_paths"] == ["a"]  # lists are replaced
    assert keys["data"]["seq_length"] == 128 and keys["data"]["data_split"] == "100,0,0"
    assert keys["model"]["lora"]["r"] == 8  # type: ignore[index]
    assert keys["model"]["lora"]["alpha"] == shipped["model"]["lora"]["alpha"]  # type: ignore[index]
    assert keys["model"]["learning_rate"] == shipped["model"]["learning_rate"]
    before = printed("--data.seq_length", "32", "--config", "lora.yaml", *files)
    assert before["data"]["seq_length"] == 128  # a file counts from where it stands


def test_a_run_of_several_files_is_named_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "site.yaml").write_text("data: {seq_length: 256}")
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "full.yaml", "--config", "site.yaml", "--dry_run"]) == 0
    assert capsys.readouterr().out.endswith("or written to checkpoints/full+site.\n")


def test_what_is_printed_is_the_same_run_when_it_is_read(printed: Printed, tmp_path: Path) -> None:
    own = ("--model.adam_epsilon", "1e-9", "--trainer.callbacks+=LearningRateMonitor", "--data.eos_token", "${EOS}")
    keys = printed("--config", "coba.yaml", *own)
    assert keys["trainer"]["callbacks"][0]["class_path"].endswith(".LearningRateMonitor")  # type: ignore[index]
    assert keys["data"]["eos_token"] == "$${EOS}"  # no variable, as the shell has put in what is one
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(keys))
    assert printed("--config", str(tmp_path / "again.yaml")) == keys
    assert "val_check_interval" not in keys["trainer"] and "dry_run" not in keys


def test_a_run_keeps_what_variables_and_paths_stood_for(
    fit: Callable[..., Path], example_tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKS", "examples/quickstart")
    monkeypatch.setenv("STEPS", "1")
    site = "data:\n  data_paths: ['${TASKS}/text_to_code']\n  cache_dir: ${CACHE:-cache}\n"
    (tmp_path / "site.yaml").write_text(f"{site}trainer:\n  max_steps: ${{STEPS}}\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    words = ("--config", "site.yaml", "--evaluation.strategy", "none")
    run = fit(tmp_path / "run", *words)
    assert checkpoints(run) == ["step-00000001"]
    keys = yaml.safe_load((run / "config.yaml").read_text())
    assert keys["data"]["data_paths"] == example_tasks[:1]
    assert keys["data"]["cache_dir"] == str(tmp_path / "cache") and keys["trainer"]["max_steps"] == 1
    monkeypatch.chdir("/")
    monkeypatch.delenv("TASKS")
    assert main(["validate", "--config", str(run / "config.yaml"), "--data.data_split", "95,5,0"]) == 0


@pytest.mark.parametrize("config", sorted(file.name for file in (ROOT / "configs").glob("*.yaml")))
def test_a_shipped_config_is_checked_and_nothing_is_trained_or_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: str
) -> None:
    monkeypatch.setattr("lightning.Trainer.fit", _must_not)
    assert main(["fit", "--config", config, "--output_dir", str(tmp_path / "deep" / "run"), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "memory      about 0." in said and "trainable parameters" in said
    assert said.endswith(f"Nothing was trained, or written to {tmp_path / 'deep' / 'run'}.\n")
    assert list(tmp_path.iterdir()) == []


def _must_not(*given: object) -> None:
    raise AssertionError("a run began")


def test_a_check_of_going_on_reads_the_checkpoint_and_changes_nothing(
    fit: Callable[..., Path],
    refused: Callable[..., str],
    fit_arguments: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = fit(tmp_path / "run", "--trainer.max_steps", "1", "--evaluation.strategy", "none")
    before = everything(run)
    again = ("--ckpt_path", "last", "--evaluation.strategy", "none", "--dry_run")
    assert main(["fit", *fit_arguments(run, *again, "--trainer.max_steps", "2")]) == 0
    assert "going on from step-00000001" in capsys.readouterr().out
    assert everything(run) == before
    assert main(["fit", *fit_arguments(run, *again, "--trainer.max_steps", "1")]) == 0
    assert "nothing to do" in capsys.readouterr().out and everything(run) == before
    assert "holds a run already" in refused(run, "--dry_run")
    (run / "step-00000001" / "model.safetensors").write_bytes(b"")
    assert "step-00000001" in refused(run, *again)


def test_a_check_refuses_what_does_not_fit(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mft_lightning.commands.step_memory._memory", lambda trainer: 1000)
    message = refused(tmp_path / "run", "--dry_run")
    assert (
        message.startswith("error: memory: about 0.") and "What needs less: python -m mft_lightning estimate" in message
    )


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    length = schema["properties"]["data"]["properties"]["seq_length"]
    assert length["default"] == 2048 and length["description"] == "most tokens of a conversation. See docs/data.md."
    assert "required" not in schema and "dry_run" not in schema["properties"]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            "data:\n  seq_length:\n",
            "data.seq_length (mine.yaml:2): null is refused; it takes an integer. Leave it out for its default",
        ),
        ("trainer: {max_steps: null}", "trainer.max_steps: null is refused; it takes an integer. Leave it out"),
        ("model: {peft_type: lorra}", "'lorra' is refused; it takes one of lora, qlora, or null. The nearest is lora."),
        ("model: {peft_type: None}", "'None' is refused; it takes one of lora, qlora, or null."),
        ("model: {pretrained_model_path: null}", "model.pretrained_model_path: is missing. Give it in a --config"),
        (
            "evaluation:\nmodel: {init: random}",
            "holds nothing. Give keys below it, or leave it out.",
        ),
        ("early_stoping: {}", "early_stoping (mine.yaml:1): there is no such group of keys. The nearest is early_stop"),
        (
            "data: {seed: 5}",
            "data.seed (mine.yaml:1): follows seed_everything. Set it there. See docs/configuration.md",
        ),
        (
            "model: 5\n",
            "is a group of keys, not 5. Give keys below it. See docs/training.md#models.",
        ),
        (
            "trainer: {logger: {class_path: CSVLogger, init_args: {save_dirr: x}}}",
            "trainer.logger (mine.yaml:1): CSVLogger takes no save_dirr. The nearest is save_dir. See docs/own",
        ),
        (
            "trainer: {logger: {class_path: gone.Logger}}",
            "trainer.logger (mine.yaml:1): gone.Logger is no class that can be used (No module named 'gone').",
        ),
        (
            "model: {optimizer: {class_path: torch.optim.SGD, init_args: {momentum: [1]}}}",
            "model.optimizer (mine.yaml:1): momentum of SGD: [1] is refused; it takes a number. See docs/",
        ),
        (
            "trainer: {callbacks: [Timer, {class_path: LearningRateMonitor, init_args: {logging_interval: stepp}}]}",
            "logging_interval of LearningRateMonitor: 'stepp' is refused; it takes one of step, epoch, or null. The n",
        ),
        ("trainer: {callbacks: [Timer, EarlyStoping]}", "no Callback goes by the name EarlyStoping. The nearest is E"),
        ("trainer: {callbacks: [{class: Timer}]}", "class: is none of class_path, init_args, dict_kwargs. Put the"),
        (
            "trainer: {strategy: dpp}",
            "trainer.strategy (mine.yaml:1): 'dpp' is refused; it takes one of auto, ddp, fsd",
        ),
        ("trainer: {devices: two}", "trainer.devices (mine.yaml:1): 'two' is refused; of cpu it takes a number from 1"),
        ("trainer: {max_time: 12:00}", "720 is refused; it takes DD:HH:MM:SS in quotes, a mapping like {hours: 5}, or"),
        ("trainer: {gradient_clip_val: -1}", "trainer.gradient_clip_val (mine.yaml:1): -1 is no number from 0 on. See"),
        ("model: {coba: {tau: 1}}", "model.coba (mine.yaml:1): is set, but model.weighted_loss_mode is case3."),
        ("trainer: {logger: TensorBordLogger}", "or null. The nearest is TensorBoardLogger. See docs/own_classes.md#l"),
        (
            "trainer: {strategy: {class_path: DDPStrategy, init_args: {find_unused: true}}}",
            "trainer.strategy (mine.yaml:1): DDPStrategy takes no find_unused. The nearest is find_unused_parameters.",
        ),
        (
            "model:\n  learning-rate: 1",
            "model.learning-rate (mine.yaml:2): there is no such key. The nearest is model.learn",
        ),
        (
            "train: {num_train_epochs: 3}",
            "train.num_train_epochs (mine.yaml:1): there is no such key. Here it is trainer.",
        ),
        (
            "trainer: {callbacks: {EarlyStopping: {patience: 3}}}",
            "EarlyStopping: is none of class_path, init_args, dict",
        ),
        (
            "trainer: {callbacks: [{class_path: RichProgressBar, init_args: {theme: {progres_bar: red}}}]}",
            "RichProgressBar takes no theme.progres_bar. The nearest is theme.progress_bar. See docs/own_classes.md#",
        ),
        ("model: {optimizer: {class_path: torch.optim.AdamW, init_args: {betas: 5}}}", "betas of AdamW: 5 is refused"),
        ("model: {optimizer: {}}", "model.optimizer (mine.yaml:1): {} is refused; it takes one of adamw, paged_adamw"),
        ("zzz: 1", "zzz (mine.yaml:1): there is no such key. See --help."),
        ("data: {seq_length: 32}\ndata: {on_overlong: drop}", "data (mine.yaml:2): stands twice, in line 1 too."),
        ("data: {cache_dir: '${NOT_SET_ANYWHERE}'}", "data.cache_dir (mine.yaml:1): the environment variable NOT_SET"),
    ],
)
def test_a_wrong_file_is_one_message(refused: Callable[..., str], tmp_path: Path, written: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(written)
    said = refused(tmp_path / "run", "--config", str(tmp_path / "mine.yaml"))
    assert message in said and said.count("\n") == 1


def test_a_wrong_file_is_named_among_several_and_not_for_what_the_command_line_says(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "right.yaml").write_text("model:\n\n  lora: {alpha: 8}\n")
    (tmp_path / "wrong.yaml").write_text("\nmodel:\n  lora: {alpha: much}\n")
    files = [word for name in ("right", "wrong") for word in ("--config", str(tmp_path / f"{name}.yaml"))]
    assert "model.lora.alpha (wrong.yaml:3): 'much' is refused" in refused(tmp_path / "run", *files)
    said = refused(tmp_path / "run", *files[:2], "--model.lora.alpha", "much")
    assert "model.lora.alpha: 'much' is refused" in said
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: r\xe9sultats")
    assert "latin.yaml: is not UTF-8 text (byte 13)" in refused(
        tmp_path / "run", "--config", str(tmp_path / "latin.yaml")
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--model.learning_rat", "1"),
            "model.learning_rat: there is no such key. The nearest is model.learning_rate.",
        ),
        (
            ("--model.learning-rate=1",),
            "model.learning-rate: there is no such key. The nearest is model.learning_rate.",
        ),
        (("--data.data_paths", "a", "b"), "b: belongs to no option. A list or a value with blanks is one word"),
        (("--config", ""), "--config: is empty."),
    ],
)
def test_a_wrong_word_is_one_message(
    refused: Callable[..., str], tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    said = refused(tmp_path / "run", *words)
    assert message in said and said.count("\n") == 1


def test_a_config_that_is_not_there_is_told_with_the_nearest_shipped_one(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    assert "The nearest is quickstart.yaml." in refused(tmp_path / "run", "--config", "quikstart.yaml")
