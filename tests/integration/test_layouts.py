"""One process, DDP and FSDP2 take the same steps, and go on from each other's checkpoints.

That a run with dropout ends with the same bits after a resume is shown on two ranks, by DDP and by FSDP2;
``MFT_WHOLE_MATRIX=1`` shows it on four too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import DROPPING
from tests.integration.conftest import checkpoints, metrics, same_weights, weights
from tests.integration.layouts import apart, differ, in_series

KINDS = ("full", "lora")
WHOLE = "MFT_WHOLE_MATRIX" in os.environ
TENSOR_PARALLEL = ("--parallel.tensor_parallel_size", "2")
LAYOUTS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "ddp2": ("ddp", 2, ()),
    "fsdp2": ("fsdp", 2, ()),
    "fsdp4": ("fsdp", 4, ()),
    "tensor2": ("fsdp", 2, TENSOR_PARALLEL),
    "fsdp2-tensor2": ("fsdp", 4, TENSOR_PARALLEL),
}
# What FSDP2 does otherwise in one of its runs of each kind, which must not change what is learnt.
OTHERWISE = {"full": ("--parallel.reshard_after_forward", "false"), "lora": ("--parallel.cpu_offload", "true")}
STEPS, LOSS, WEIGHTS = 10, 1e-5, 1e-9  # what is run, and what may differ: relative in float32, absolute in float64
# four micro-batches a step in one process; validated in between, so that new bests save at the same steps
COMMON = ("--trainer.max_steps", str(STEPS), "--data.per_device_train_batch_size", "4")
FLOAT64 = ("--trainer.precision", "64-true", "--evaluation.strategy", "none", "--checkpoint.save_total_limit", "null")
HALF = "step-00000004"


@pytest.fixture(scope="session")
def dropping_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with dropout."""
    directory = tmp_path_factory.mktemp("dropping")
    for file in tiny_model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text()) | DROPPING
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def one_process(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``full32``, ``full64``, ``lora32`` and ``lora64`` in one process, the reference of all others."""
    directory = tmp_path_factory.mktemp("one")
    for kind in KINDS:
        words = (*COMMON, *_of(kind))
        fit(directory / f"{kind}32", *words, config=f"{kind}.yaml")
        fit(directory / f"{kind}64", *words, *FLOAT64, config=f"{kind}.yaml")
    return directory


def _of(kind: str) -> tuple[str, ...]:
    return ("--model.lora.dropout", "0") if kind == "lora" else ()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_takes_the_steps_of_one_process(
    fit_arguments: Callable[..., list[str]],
    fit: Callable[..., Path],
    one_process: Path,
    dropping_model: Path,
    tmp_path: Path,
    layout: str,
) -> None:
    strategy, ranks, options = LAYOUTS[layout]
    resumed = ranks == 2 or WHOLE  # else from one process's checkpoint alone
    lines = []

    def run(name: str, kind: str, *words: str) -> None:
        arguments = fit_arguments(tmp_path / name, *COMMON, *words, config=f"{kind}.yaml")
        lines.append(["fit", *arguments, "--trainer.strategy", strategy, *options])

    for kind in KINDS:
        run(f"{kind}32", kind, *_of(kind))
        from_one = (
            "--ckpt_path",
            str(one_process / f"{kind}64" / HALF),
            *(OTHERWISE[kind] if layout == "fsdp2" else ()),
        )
        run(f"{kind}64-from-one", kind, *_of(kind), *FLOAT64, *from_one)
        if not resumed:
            continue
        run(f"{kind}64", kind, *_of(kind), *FLOAT64)
        dropping = ("--model.pretrained_model_path", str(dropping_model), "--evaluation.strategy", "none")
        run(f"{kind}-dropping", kind, *dropping, "--checkpoint.save_total_limit", "null")
        run(f"{kind}-resumed", kind, *dropping, "--ckpt_path", str(tmp_path / f"{kind}-dropping" / HALF))
    printed = in_series(ranks, lines, tmp_path)

    assert printed.count("trained to step") == len(lines)  # said by one rank
    assert f"{ranks} x cpu, {strategy}" in printed
    assert printed.count(" go on where 1 process(es) left off, over the same global batches.") == len(KINDS)
    for kind in KINDS:
        assert differ(metrics(one_process / f"{kind}32"), metrics(tmp_path / f"{kind}32")) < LOSS
        assert checkpoints(tmp_path / f"{kind}32") == checkpoints(one_process / f"{kind}32")
        reference = weights(one_process / f"{kind}64" / f"step-{STEPS:08d}")
        last = f"step-{STEPS:08d}"
        assert apart(reference, weights(tmp_path / f"{kind}64-from-one" / last)) < WEIGHTS
        if not resumed:
            continue
        assert apart(reference, weights(tmp_path / f"{kind}64" / last)) < WEIGHTS
        assert same_weights(tmp_path / f"{kind}-dropping" / last, tmp_path / f"{kind}-resumed" / last)
        from_there = ("--ckpt_path", str(tmp_path / f"{kind}64" / HALF))
        back = fit(tmp_path / f"{kind}-back", *COMMON, *_of(kind), *FLOAT64, *from_there, config=f"{kind}.yaml")
        assert apart(reference, weights(back / last)) < WEIGHTS
    assert same_weights(one_process / "lora32" / "base", tmp_path / "lora32" / "base")  # the same random bits


def test_ranks_without_work_take_part(
    fit_arguments: Callable[..., list[str]], fit: Callable[..., Path], tmp_path: Path
) -> None:
    """One conversation a step, and one to validate on, for two ranks."""
    few = ("--data.total_train_batch_size", "1", "--evaluation.max_conversations_per_task", "1")
    few += ("--evaluation.exclude_tasks", "[text_to_code,unit_tests]", "--trainer.max_steps", "6")
    lines = []
    for kind in KINDS:
        words = (*few, *_of(kind))
        fit(tmp_path / f"{kind}-one", *words, config=f"{kind}.yaml")
        for strategy in ("ddp", "fsdp"):
            arguments = fit_arguments(tmp_path / f"{kind}-{strategy}", *words, config=f"{kind}.yaml")
            lines.append(["fit", *arguments, "--trainer.strategy", strategy])
    in_series(2, lines, tmp_path)
    for kind in KINDS:
        for strategy in ("ddp", "fsdp"):
            assert differ(metrics(tmp_path / f"{kind}-one"), metrics(tmp_path / f"{kind}-{strategy}")) < LOSS


def test_gradients_are_reduced_once_a_step(fit_arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    lines = []
    for strategy in ("ddp", "fsdp"):
        for size in ("2", "8"):  # four micro-batches of each rank, or one
            name = f"{strategy}{size}"
            counted = f"--trainer.callbacks.file={tmp_path / name}.jsonl"
            words = ("--trainer.strategy", strategy, "--trainer.max_steps", "3", "--evaluation.strategy", "none")
            words += ("--data.per_device_train_batch_size", size)
            words += ("--trainer.callbacks+=tests.integration.collectives.Collectives", counted)
            lines.append(["fit", *fit_arguments(tmp_path / name, *words)])
    in_series(2, lines, tmp_path)
    for strategy, name, times in (("ddp", "c10d::allreduce_", 1), ("fsdp", "c10d::_reduce_scatter_base_", 3)):
        for size in ("2", "8"):
            steps = [json.loads(line) for line in (tmp_path / f"{strategy}{size}.jsonl").read_text().splitlines()]
            # DDP has one bucket here; FSDP2 has two layers and the rest
            assert [counts[name] for counts in steps] == [times] * 3, (strategy, size)
