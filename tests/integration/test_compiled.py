"""``model.compile_layers``, with the machine's own compiler."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import metrics, same_weights

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler g++ here")


@pytest.fixture(autouse=True)
def compiled_here_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@needs_compiler
def test_a_run_learns_the_same_and_resumes_exactly(fit: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> None:
    """Of one layer, which is the last one: another would be compiled by itself, and tests/model has both."""
    shutil.copytree(tiny_model, tmp_path / "model")
    sizes = json.loads((tiny_model / "config.json").read_text()) | {"num_hidden_layers": 1}
    (tmp_path / "model" / "config.json").write_text(json.dumps(sizes))
    words = ("--trainer.max_steps", "4", "--checkpoint.checkpointing_steps", "2", "--evaluation.steps", "2")
    words += ("--model.pretrained_model_path", str(tmp_path / "model"))
    plain, whole, part = (tmp_path / name for name in ("plain", "whole", "part"))
    fit(plain, *words)
    fit(whole, *words, "--model.compile_layers", "true")
    for theirs, ours in zip(metrics(plain), metrics(whole), strict=True):
        for name in ("train/loss", "train/grad_norm", "val/loss"):
            if theirs[name]:
                assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-5)
    assert not same_weights(plain / "step-00000004", whole / "step-00000004")  # in their last digits
    fit(part, *words, "--model.compile_layers", "true", "--ckpt_path", str(whole / "step-00000002"))
    assert same_weights(part / "step-00000004", whole / "step-00000004")


def test_layers_that_devices_share_are_not_compiled(refused: Callable[..., str], tmp_path: Path) -> None:
    words = ("--trainer.devices", "2", "--trainer.strategy", "fsdp", "--parallel.tensor_parallel_size", "2")
    message = refused(tmp_path / "run", *words, "--model.compile_layers", "true")
    assert "model.compile_layers: layers that parallel.tensor_parallel_size shares out" in message


def test_a_machine_without_a_compiler_is_told_before_anything_is_written(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    message = refused(tmp_path / "run", "--model.compile_layers", "true")
    assert "model.compile_layers: torch.compile does not work here" in message and "no-such-compiler" in message
