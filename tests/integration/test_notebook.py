"""Runs from Python beside those of the command line: the same bits, and errors in the same words."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import mft_lightning
from mft_lightning import (
    CheckpointSettings,
    EvaluationSettings,
    LoraSettings,
    MFTDataModule,
    MFTModule,
    Trainer,
    UserError,
)
from mft_lightning.cli import main
from tests.conftest import ROOT
from tests.integration.conftest import checkpoints, metrics, same_weights

PAGE = (ROOT / "docs" / "python_api.md").read_text()


@pytest.fixture
def objects(tiny_model: Path, example_tasks: list[str]) -> Callable[..., tuple[MFTModule, MFTDataModule]]:
    """Model and data of the runs that the fixture ``fit`` makes."""

    def make(data: dict[str, Any] | None = None, **model: Any) -> tuple[MFTModule, MFTDataModule]:
        given: dict[str, Any] = {"seq_length": 512, "total_train_batch_size": 16, "per_device_train_batch_size": 8}
        given |= {"num_workers": 0, "data_split": "95,5,0", **(data or {})}
        given_model: dict[str, Any] = {"init": "random", "learning_rate": 1e-2, "num_warmup_steps": 2, **model}
        return (
            MFTModule(pretrained_model_path=str(tiny_model), **{"min_lr": 1e-5, **given_model}),
            MFTDataModule(data_paths=example_tasks, tokenizer_path=str(tiny_model), **given),
        )

    return make


def trainer_of(output_dir: Path, **keys: Any) -> Trainer:
    evaluation = EvaluationSettings(steps=4, max_conversations_per_task=6)
    given = {"evaluation": evaluation, "checkpoint": CheckpointSettings(checkpointing_steps=4)}
    return Trainer(output_dir, **{"max_steps": 8, "log_every_n_steps": 1, **given, **keys})


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_bits_of_the_command_line(
    objects: Callable[..., tuple[MFTModule, MFTDataModule]],
    fit: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    """LoRA with another seed and precision than the defaults, which only the Trainer is told."""
    if kind == "full":
        line, model_keys, keys = fit(tmp_path / "line"), {}, {}
    else:
        words = ("--seed_everything", "7", "--trainer.precision", "bf16-mixed")
        line = fit(tmp_path / "line", *words, config="lora.yaml")
        adapters = LoraSettings(r=4, alpha=32, dropout=0.05)
        model_keys = {"peft_type": "lora", "lora": adapters, "min_lr": 2e-5}
        keys = {"seed": 7, "precision": "bf16-mixed"}
    model, data = objects(**model_keys)
    trainer = trainer_of(tmp_path / "python", **keys)
    trainer.fit(model, data)
    assert metrics(tmp_path / "python") == metrics(line)
    assert checkpoints(tmp_path / "python") == checkpoints(line)
    for name in checkpoints(line):
        assert same_weights(line / name, tmp_path / "python" / name)
    last = metrics(line)[-1]
    assert trainer.metrics["val/loss"] == pytest.approx(float(last["val/loss"]), rel=1e-6)
    assert trainer.last_model_path == tmp_path / "python" / "step-00000008"
    # and goes on from the command line's checkpoint, in new objects and in those at hand
    for number, pair in enumerate((objects(**model_keys), (model, data))):
        on = trainer_of(tmp_path / f"on-{number}", **keys)
        on.fit(*pair, ckpt_path=line / "step-00000004")
        assert same_weights(line / "step-00000008", tmp_path / f"on-{number}" / "step-00000008")
    # where nothing is left to do, the model is the checkpoint's all the same
    at_end, whole = trainer_of(tmp_path / "on-1", **keys), objects(**model_keys)[0]
    at_end.fit(whole, data, ckpt_path="last")
    assert at_end.metrics["val/loss"] == at_end.validate(whole, data)["val/loss"] == on.metrics["val/loss"]
    fewer = trainer_of(tmp_path / "on-1", **keys, evaluation=EvaluationSettings(max_conversations_per_task=1))
    assert fewer.validate(model, data)["val/loss"] != pytest.approx(float(last["val/loss"]), rel=1e-6)
    assert "the model as it is" in capsys.readouterr().out
    measured = on.validate(model, data, ckpt_path="best")
    assert measured["val/loss"] == pytest.approx(float(last["val/loss"]), rel=1e-6)


def test_the_page_s_own_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps: 300 take a minute. The keys are those of configs/quickstart.yaml."""
    first, then = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len([line for line in first.splitlines() if line]) <= 12, "about ten lines"
    quick = ("max_steps=300", 'max_steps=2, accelerator="cpu"'), ("exact_match_per_task=100", "exact_match_per_task=1")
    for long, short in quick:
        assert long in first
        first = first.replace(long, short)
    monkeypatch.chdir(tmp_path)
    transformers_logging.enable_progress_bar()
    filters, names = list(warnings.filters), {}
    exec(first + then, names)
    assert warnings.filters == filters and transformers_logging.is_progress_bar_enabled()
    words = ("--trainer.max_steps", "2", "--evaluation.exact_match_per_task", "1", "--trainer.accelerator", "cpu")
    assert main(["fit", "--config", "quickstart.yaml", *words]) == 0
    line, python = tmp_path / "checkpoints" / "quickstart", tmp_path / "checkpoints" / "notebook"
    assert same_weights(line / "step-00000002", python / "step-00000002") and metrics(line) == metrics(python)
    opened = AutoModelForCausalLM.from_pretrained(line / "step-00000002")
    for ours, theirs in zip(names["trained"].parameters(), opened.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Counting(L.Callback):
    """A user's, with a state."""

    steps = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def test_callbacks_and_classes_of_one_s_own(
    objects: Callable[..., tuple[MFTModule, MFTDataModule]], fit: Callable[..., Path], tmp_path: Path
) -> None:
    line = fit(tmp_path / "line", "--model.optimizer", "torch.optim.SGD", "--model.optimizer.momentum", "0.9")
    counting = Counting()
    model, data = objects(optimizer=partial(torch.optim.SGD, momentum=0.9))
    trainer_of(tmp_path / "python", callbacks=counting).fit(model, data)
    again = Counting()
    model, data = objects(optimizer=partial(torch.optim.SGD, momentum=0.9))
    half = tmp_path / "python" / "step-00000004"
    on = trainer_of(tmp_path / "on", callbacks=[again])
    with ThreadPoolExecutor(1) as elsewhere:  # where Python hears no signal
        elsewhere.submit(on.fit, model, data, ckpt_path=half).result()
    assert (counting.steps, again.steps) == (8, 8)
    for run in (tmp_path / "python", tmp_path / "on"):
        assert metrics(line)[-1]["val/loss"] == metrics(run)[-1]["val/loss"]


REFUSED: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ({"seed": 7}, {}, {}, "MFTModule: seed is 7, but that of the Trainer is 42. Make a new one, without a seed."),
    ({}, {"seed": 7}, {"seed": 8}, "MFTDataModule: seed is 7, but that of the Trainer is 8."),
    ({"dtype": "float64"}, {}, {}, "MFTModule: dtype is float64, but precision 32-true takes float32. Make a new one"),
    ({"tokenizer_path": "gone"}, {}, {}, "MFTModule: tokenizer_path is gone, but that of the MFTDataModule is "),
    ({}, {"devices": 2}, {}, "MFTDataModule: devices is 2, but a Trainer from Python runs on one."),
    ({}, {"max_evaluation_conversations": 3}, {}, "MFTDataModule: limits evaluations otherwise than evaluation does."),
    ({}, {}, {"precision": "8-bit"}, "trainer.precision: '8-bit' is refused; it takes one of"),
    ({}, {"data_split": "100,0,0"}, {}, "data.data_split: no conversation to evaluate (valid) is left"),
]


@pytest.mark.parametrize(("model", "data", "keys", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_what_contradicts_is_refused(
    objects: Callable[..., tuple[MFTModule, MFTDataModule]],
    tmp_path: Path,
    model: dict[str, Any],
    data: dict[str, Any],
    keys: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        trainer_of(tmp_path / "run", **keys).fit(*objects(data, **model))
    assert not (tmp_path / "run").exists()


def test_what_a_trainer_cannot_take_is_refused_when_it_is_made(tmp_path: Path) -> None:
    for keys, message in (
        ({"precision": "bf32"}, "trainer.precision: 'bf32' is refused; it takes one of"),
        ({"max_steps": 0}, "trainer.max_steps: 0 is no number from 1 on."),
        ({"seed": -1}, "seed: -1 is no number from 0"),
        ({"evaluation": {"steps": 4}}, "trainer.evaluation: takes EvaluationSettings, not {'steps': 4}."),
        (
            {"callbacks": [L.Callback]},
            "trainer.callbacks: <class 'lightning.pytorch.callbacks.callback.Callback'> is no C",
        ),
        ({"logger": "csv"}, "trainer.logger: 'csv' is no Logger of Lightning's."),
        ({"checkpoint": CheckpointSettings(sharded=True)}, "checkpoint.sharded: is for several devices."),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            Trainer(tmp_path / "run", **keys)


def test_a_run_is_not_begun_twice(
    objects: Callable[..., tuple[MFTModule, MFTDataModule]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = objects()
    trainer_of(tmp_path / "run", max_steps=1, logger=False).fit(model, data)
    with pytest.raises(UserError, match="model: was built before"):
        trainer_of(tmp_path / "other").fit(model, data)
    with pytest.raises(UserError, match="holds a run already"):
        trainer_of(tmp_path / "run").fit(objects()[0], data)
    with pytest.raises(
        UserError, match="takes an MFTModule and an MFTDataModule, in this order, not MFTDataModule and"
    ):
        trainer_of(tmp_path / "run").fit(data, model)  # type: ignore[arg-type]
    for name, value in (
        ("WORLD_SIZE", "2"),
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "x"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="runs on one device"):
        trainer_of(tmp_path / "third").fit(objects()[0], data)


class Signalled(L.Callback):
    """Signals to this process in the second step."""

    def __init__(self, *signals: signal.Signals) -> None:
        self.signals = signals

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        for number in self.signals if trainer.global_step == 1 else ():
            signal.raise_signal(number)


@pytest.mark.parametrize(
    ("signals", "raised"),
    [
        ([signal.SIGINT], None),
        ([signal.SIGINT, signal.SIGINT], KeyboardInterrupt),
        ([signal.SIGTERM], SystemExit),
    ],
    ids=["interrupted", "interrupted twice", "ended"],
)
def test_signals(
    objects: Callable[..., tuple[MFTModule, MFTDataModule]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    signals: list[signal.Signals],
    raised: type[BaseException] | None,
) -> None:
    """One interrupt ends the run in order, a second one as it ends any cell; the end of the process ends all."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # no file, as a notebook's is none
    trainer = trainer_of(tmp_path / "run", callbacks=Signalled(*signals), logger=False)
    with pytest.raises(raised) if raised is not None else nullcontext():
        trainer.fit(*objects())
    assert checkpoints(tmp_path / "run") == ([] if len(signals) > 1 else ["step-00000002"])
    assert ("ending after this step" in capfd.readouterr().err) == (signal.SIGINT in signals)
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_plain_trainer_is_refused(objects: Callable[..., tuple[MFTModule, MFTDataModule]], tmp_path: Path) -> None:
    model, data = objects()
    plain = L.Trainer(max_steps=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(UserError, match=re.escape("Use mft_lightning.Trainer")):
        plain.fit(model, datamodule=data)


def test_names_are_imported_when_they_are_asked_for() -> None:
    script = "import sys, mft_lightning; print('lightning' in sys.modules, 'torch' in sys.modules)\n"
    script += "from mft_lightning import UserError; print('torch' in sys.modules)\n"
    script += "import mft_lightning as m; print(sorted(m.__all__) == m.__all__, set(m.__all__) <= set(dir(m)))\n"
    script += "print(hasattr(m, 'Trainers'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False", "True", "True", "False"]
    assert all(getattr(mft_lightning, name) for name in dir(mft_lightning))
