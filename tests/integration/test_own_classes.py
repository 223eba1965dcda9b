"""Callbacks, loggers, optimizers and balancers of the user's own, as docs/own_classes.md shows them."""

from __future__ import annotations

import csv
import functools
import re
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks
from lightning_utilities.core.imports import RequirementCache

from mft_lightning.cli import main
from mft_lightning.training.hooks import check_hooks
from tests.conftest import ROOT
from tests.integration.conftest import TASKS, metrics, same_weights, weights
from tests.integration.layouts import apart, in_series

DOCUMENT = (ROOT / "docs" / "own_classes.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user who followed the page, with ``own.py`` and ``own.yaml``."""
    (code,), config = blocks("python"), blocks("yaml")[0]
    (tmp_path / "own.py").write_text(code)
    (tmp_path / "own.yaml").write_text(config.replace("save_dir: ", f"save_dir: {tmp_path}/"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return tmp_path


def test_one_of_each_as_documented(own: Path, fit: Callable[..., Path]) -> None:
    words = ("--config", "own.yaml", "--data.total_train_batch_size", "4")
    run = fit(own / "run", *words)
    rows = metrics(run)
    # the balancer's weights, from losses of the steps before; a task that was absent has the loss it had last
    losses, weighted, absent = dict.fromkeys(TASKS, 1.0), dict.fromkeys(TASKS, 1.0), 0
    for row in (row for row in rows if row["train/loss"]):
        assert {task: float(row[f"train/weight/{task}"]) for task in TASKS} == pytest.approx(weighted, rel=1e-5)
        present = {task: float(value) for task in TASKS if (value := row[f"train/loss/{task}"])}
        losses, absent = losses | present, absent + len(TASKS) - len(present)
        powers = {task: loss**0.5 for task, loss in losses.items()}
        weighted = {task: 3 * power / sum(powers.values()) for task, power in powers.items()}
    assert absent
    # the callback's own metric, at the step it is of
    loss = {row["step"]: float(row["train/loss"]) for row in rows if row["train/loss"]}
    above = {row["step"]: float(row["train/above"]) for row in rows if row["train/above"]}
    assert above.keys() == loss.keys() == set(map(str, range(1, 9)))
    for step, value in above.items():
        assert value == pytest.approx(loss[step] - 0.5, abs=1e-5)
    # the logger's own file: losses alone, at the same steps
    (file,) = (own / "checkpoints" / "losses").rglob("metrics.csv")
    with file.open(newline="") as handle:
        kept = list(csv.DictReader(handle))
    assert all("loss" in name or name == "step" for name in kept[0])
    assert {row["step"]: float(row["train/loss"]) for row in kept if row["train/loss"]} == pytest.approx(loss)
    assert "weighted_loss_mode" in (file.parent / "hparams.yaml").read_text()
    # the run goes on with the bits of one that was not stopped, the weights of tasks included
    on = fit(own / "on", *words, "--ckpt_path", str(run / "step-00000004"))
    assert same_weights(run / "step-00000008", on / "step-00000008")
    # and the callback ends a run
    ended = fit(own / "ended", *words, "--trainer.callbacks.loss", "100")
    assert (ended / "step-00000001").is_dir() and not (ended / "step-00000004").exists()


def test_an_optimizer_of_torch_takes_the_steps_of_torch(fit: Callable[..., Path], tmp_path: Path) -> None:
    """One step of SGD from the same start is the gradient times the rate: twice the rate, twice as far."""
    words = ("--trainer.max_steps", "1", "--evaluation.strategy", "none", "--checkpoint.checkpointing_steps", "1")
    words += ("--model.weight_decay", "0", "--model.num_warmup_steps", "0", "--model.lr_scheduler_type", "constant")
    words += ("--model.min_lr", "0", "--model.optimizer", "torch.optim.SGD", "--trainer.precision", "64-true")
    at = {}
    for rate in (1, 2, 4):
        run = fit(tmp_path / str(rate), *words, "--model.learning_rate", str(rate), "--model.optimizer.momentum", "0.9")
        at[rate] = weights(run / "step-00000001")
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    start = 2 * at[1][name] - at[2][name]
    assert not torch.equal(at[1][name], at[2][name])
    torch.testing.assert_close(at[4][name], 4 * at[1][name] - 3 * start)


def test_two_processes_take_the_same_steps(
    fit_arguments: Callable[..., list[str]], fit: Callable[..., Path], own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{own}:{ROOT}")
    words = ("--config", str(own / "own.yaml"), "--trainer.precision", "64-true", "--trainer.max_steps", "4")
    one = fit(own / "one", *words)
    lines = [
        [
            "fit",
            *fit_arguments(own / name, *words, "--trainer.strategy", name, "--data.per_device_train_batch_size", "4"),
        ]
        for name in ("ddp", "fsdp")
    ]
    in_series(2, lines, own)
    for name in ("ddp", "fsdp"):
        assert apart(weights(one / "step-00000004"), weights(own / name / "step-00000004")) < 1e-9


FAULTS = "tests.integration.faults"
REFUSED = [
    (
        "--model.optimizer torch.optim.SDG",
        "'torch.optim' has no attribute 'SDG'). The nearest is torch.optim.SGD. See docs/training.md#learning-rate.",
    ),
    (
        "--model.optimizer torch.optim.SGD --model.optimizer.lr 3",
        "model.optimizer: SGD takes no lr here. Use model.learning_rate.",
    ),
    (
        "--model.optimizer torch.optim.SGD --model.optimizer.weight_decay 3",
        "weight_decay of torch.optim.sgd.SGD has no effect here",
    ),
    (
        "--model.optimizer torch.optim.SGD --model.adam_beta1 0.8",
        "model.adam_beta1: has no effect on torch.optim.sgd.SGD.",
    ),
    ("--model.optimizer torch.optim.Rprop", "model.weight_decay: 0.1 means nothing to torch.optim.rprop.Rprop"),
    ("--model.optimizer torch.optim.Muon", "model.optimizer: cannot be made of these parameters (Muon only supports"),
    ("--model.optimizer torch.optim.LBFGS --model.weight_decay 0", "LBFGS doesn't support per-parameter options"),
    (
        "--model.weighted_loss_mode case7",
        "it takes one of case1, case2, case3, case4, coba, famo, or a Balancer by its",
    ),
    ("--model.weighted_loss_mode own.StopBelow", "own.StopBelow is none of case1"),
    (
        "--model.weighted_loss_mode own.HarderFirst --model.weighted_loss_mode.powr 3",
        "HarderFirst takes no powr. The nearest is power.",
    ),
    (
        "--model.weighted_loss_mode own.HarderFirst --model.coba.tau 1",
        "model.coba: is set, but model.weighted_loss_mode",
    ),
    ("--trainer.callbacks+=own.Nowhere", "trainer.callbacks: own.Nowhere is no class that can be used (module 'own'"),
    ("--trainer.callbacks+=own.SignSGD", "trainer.callbacks: own.SignSGD is no class that can be used (no Callback"),
    ("--trainer.callbacks+=own.StopBelo", "The nearest is own.StopBelow. See docs/own_classes.md#callbacks."),
    ("--trainer.callbacks+=own.StopBelow", "trainer.callbacks: StopBelow needs loss. Give it in init_args."),
    (
        "--trainer.callbacks+=own.StopBelow --trainer.callbacks.loss x",
        "loss of StopBelow: 'x' is refused; it takes a number.",
    ),
    (
        "--trainer.logger CSVLogger",
        "trainer.logger: CSVLogger needs save_dir. Give it in init_args. See docs/own_classes.md#loggers.",
    ),
    (f"--model.optimizer {FAULTS}.UnmadeOptimizer", "model.optimizer: cannot be made of these parameters (no such dev"),
    (
        f"--model.optimizer {FAULTS}.DeafOptimizer",
        "DeafOptimizer is asked for with a closure that computes the gradients, and",
    ),
    (
        f"--model.optimizer {FAULTS}.OldOptimizer",
        "and fails (OldOptimizer.step() got an unexpected keyword argument 'closure'). Let its step",
    ),
    (f"--model.weighted_loss_mode {FAULTS}.Unfinished", "of 3 task(s) (Can't instantiate abstract class Unfinished"),
    (f"--model.weighted_loss_mode {FAULTS}.Unprepared", "Unprepared has to call super().__init__(tasks) with the 3"),
    (
        f"--trainer.callbacks+=Timer --trainer.callbacks+={FAULTS}.Unmade --trainer.callbacks+=DeviceStatsMonitor",
        "error: Unmade cannot be made: 'threshold'\n",
    ),
    (
        f"--trainer.callbacks+={FAULTS}.Counting --trainer.callbacks+={FAULTS}.Counting",
        "trainer: Found more than one stateful callback of type `Counting`",
    ),
    (
        f"--trainer.callbacks+={FAULTS}.StateOfObjects --dry_run",
        "the state of StateOfObjects (trainer.callbacks) holds other things than numbers, text",
    ),
    (
        f"--model.weighted_loss_mode {FAULTS}.StateOfLocks --dry_run",
        "the state of tests.integration.faults.StateOfLocks (model.weighted_loss_mode) holds other things",
    ),
    (
        f"--trainer.callbacks+={FAULTS}.ShortHook --dry_run",
        "trainer.callbacks: ShortHook.on_train_batch_end cannot be called with what it is given (too many positional "
        "arguments). Write it as on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx). See "
        "docs/own_classes.md#callbacks.",
    ),
    (
        f"--trainer.callbacks+={FAULTS}.OtherSetup",
        "given (missing a required argument: 'phase'). Write it as setup(self, trainer, pl_module, stage).",
    ),
    (
        f"--model.weighted_loss_mode {FAULTS}.ShortBalancer --dry_run",
        "ShortBalancer.after_step cannot be called with what it is given (too many positional arguments). Write it as "
        "after_step(self, step, train, valid).",
    ),
    (
        "--trainer.callbacks+=LearningRateFinder",
        "trainer.callbacks: LearningRateFinder does not work here. Use model.learning_rate.",
    ),
    (
        f"--trainer.callbacks+={FAULTS}.UntypedCallback",
        "trainer.callbacks: UntypedCallback needs needed. Give it in init_args.",
    ),
    (
        f"--trainer.callbacks+={FAULTS}.UntypedCallback --trainer.callbacks.needed null",
        "trainer.callbacks: UntypedCallback needs needed. Give it in init_args.",
    ),
    (f"--trainer.logger {FAULTS}.UntypedLogger", "trainer.logger: UntypedLogger needs needed. Give it in init_args."),
    (
        f"--model.optimizer {FAULTS}.UntypedOptimizer",
        "model.optimizer: UntypedOptimizer needs needed. Give it in init_args.",
    ),
    (
        f"--model.weighted_loss_mode {FAULTS}.UntypedBalancer",
        "model.weighted_loss_mode: UntypedBalancer needs needed. Give it in init_args.",
    ),
    ("--trainer.logger nowhere.Logger", "trainer.logger: nowhere.Logger is no class that can be used (No module named"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[words for words, _ in REFUSED])
def test_what_cannot_be_used_is_refused(own: Path, refused: Callable[..., str], words: str, message: str) -> None:
    assert message in refused(own / "run", *words.split())


@pytest.mark.parametrize(
    ("balancer", "message"),
    [
        ("DoubledWeights", "the weights of tests.integration.faults.DoubledWeights, tensor([2., 2., 2.]"),
        ("DueNumber", "batches_due of tests.integration.faults.DueNumber gave 1. It has to give a range"),
        ("UnsaidDue", "tests.integration.faults.UnsaidDue asks for validation batches, but has not said so"),
    ],
)
def test_what_a_run_cannot_take_of_a_balancer_ends_it(
    own: Path,
    fit_arguments: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    balancer: str,
    message: str,
) -> None:
    words = ("--model.weighted_loss_mode", f"{FAULTS}.{balancer}", "--evaluation.strategy", "none")
    assert main(["fit", *fit_arguments(own / "run", *words)]) == 1
    assert message in capsys.readouterr().err


def test_hooks_of_lightning_s_callbacks_can_be_called() -> None:
    for name in callbacks.__all__:
        kind = getattr(callbacks, name)
        check_hooks("trainer.callbacks", kind.__new__(kind), L.Callback)


def test_hooks_that_a_decorator_made_or_that_are_switched_off_can_be_called() -> None:
    def timed(hook: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(hook)
        def call(self: object, trainer: object, *rest: object) -> None:
            hook(self, trainer, time.perf_counter())

        return call

    class Timed(L.Callback):
        on_train_end = None

        @timed
        def on_train_batch_end(self, trainer: object, seconds: float) -> None:
            pass

    check_hooks("trainer.callbacks", Timed(), L.Callback)


@pytest.mark.parametrize(("package", "logger"), [("wandb", "WandbLogger"), ("mlflow", "MLFlowLogger")])
def test_a_service_whose_package_is_missing_is_named(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, logger: str
) -> None:
    absent = RequirementCache(f"absent_{package}>=1")
    monkeypatch.setattr(f"lightning.pytorch.loggers.{package}._{package.upper()}_AVAILABLE", absent)
    message = refused(tmp_path / "run", "--trainer.logger", logger)
    assert f"{logger} cannot be made: " in message and f"pip install -U 'absent_{package}" in message


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """All that W&B's package is told: one that has what Lightning's WandbLogger asks of it."""
    told: list[tuple[str, Any]] = []

    def init(resume: str | None = None, **given: Any) -> types.SimpleNamespace:  # the parser reads it, and remembers
        told.append(("init", given))
        config = types.SimpleNamespace(update=lambda keys, **_: told.append(("config", keys)))
        return types.SimpleNamespace(name="first", id="first", config=config, log=lambda v: told.append(("log", v)))

    parts = {"wandb": {"run": None, "init": init}, "wandb.sdk": {}}
    parts |= {
        "wandb.sdk.lib": {"RunDisabled": type("RunDisabled", (), {})},
        "wandb.wandb_run": {"Run": type("Run", (), {})},
    }
    for name, holds in parts.items():
        module = types.ModuleType(name)
        vars(module).update(holds)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    return told


def test_wandb_is_told_keys_and_metrics(fit: Callable[..., Path], tmp_path: Path, told: list[tuple[str, Any]]) -> None:
    documented = next(text for text in blocks("yaml") if "WandbLogger" in text)
    (tmp_path / "wandb.yaml").write_text(documented)
    run = fit(tmp_path / "run", "--config", str(tmp_path / "wandb.yaml"), "--trainer.max_steps", "2")
    (given,) = [values for kind, values in told if kind == "init"]
    assert (given["project"], given["id"]) == ("mft", "first-run")
    (keys,) = [values for kind, values in told if kind == "config"]
    assert keys["data"]["total_train_batch_size"] == 16
    logged = [values for kind, values in told if kind == "log" and "train/loss" in values]
    ours = [row for row in metrics(run) if row["train/loss"]]
    assert [(str(v["trainer/global_step"]), v["train/loss"]) for v in logged] == [
        (row["step"], float(row["train/loss"])) for row in ours
    ]


@pytest.mark.usefixtures("told")
def test_uploads_of_checkpoints_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    words = ("--trainer.logger", "WandbLogger", "--trainer.logger.log_model", "true")
    assert "trainer.logger: WandbLogger uploads no checkpoint" in refused(tmp_path / "run", *words)


@pytest.mark.parametrize(("package", "logger"), [("wandb", "WandbLogger"), ("mlflow", "MLFlowLogger")])
def test_a_service_as_documented(
    fit: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, logger: str
) -> None:
    pytest.importorskip(package, reason=f"{package}, which only its own logger needs, is not installed")
    monkeypatch.chdir(tmp_path)
    Path("service.yaml").write_text(next(text for text in blocks("yaml") if logger in text))
    fit(tmp_path / "run", "--config", "service.yaml", "--trainer.max_steps", "2")
    kept = tmp_path / ("checkpoints/wandb" if package == "wandb" else "mlflow.db")
    assert kept.exists()
