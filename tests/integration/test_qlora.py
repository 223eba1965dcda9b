"""Runs on a base in 4 or 8 bits: they learn, resume to the bit, and are what transformers and peft make of them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mft_lightning.cli import main
from mft_lightning.commands.loading import load_model
from mft_lightning.errors import UserError
from mft_lightning.model.parallel import ParallelSettings
from mft_lightning.training.checkpoint_dirs import read_metadata
from mft_lightning.training.layout import Layout
from mft_lightning.training.strategies import make_strategy
from tests.integration.conftest import ROOT, checkpoints, metrics, same_weights, user_environment, weights
from tests.integration.layouts import differ, in_series

CONFIG = "qlora.yaml"
KINDS = {
    "nf4": (),
    "nf4, bf16-mixed, activations again": (
        "--trainer.precision",
        "bf16-mixed",
        "--model.checkpoint_activations",
        "true",
    ),
    "8 bits": ("--model.qlora.bits", "8"),
}
KEEP_ALL = ("--checkpoint.save_total_limit", "null", "--evaluation.steps", "3", "--checkpoint.checkpointing_steps", "2")
IN_PARTS = ("--data.per_device_train_batch_size", "4")
IDS = torch.arange(2, 62).view(2, 30)


@pytest.fixture(scope="module")
def run(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 8 steps, saved after every second one."""
    return fit(tmp_path_factory.mktemp("qlora"), *KEEP_ALL, *IN_PARTS, config=CONFIG)


def test_a_run_learns_and_its_checkpoint_tells_how(run: Path) -> None:
    losses = [float(row["val/loss"]) for row in metrics(run) if row["val/loss"]]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True) and losses[0] - losses[-1] > 0.1
    last = run / "step-00000008"
    assert {name.split(".")[-2] for name in weights(last)} == {"lora_A", "lora_B"}
    described = read_metadata(last)
    assert {key: value for key, value in described["fingerprint"].items() if "qlora" in key} == {
        "model.qlora.bits": 4,
        "model.qlora.quant_type": "nf4",
        "model.qlora.double_quant": True,
        "model.qlora.compute_dtype": "float32",
    }
    assert "bitsandbytes" in described["versions"]


def test_a_run_that_starts_from_its_adapter_in_other_bits_says_so(
    fit: Callable[..., Path], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its base on the disk is the same one, which LoRA trains on as it is."""
    words = ("--model.lora.r", "96", "--model.lora.start_from", str(run / "step-00000008"), "--trainer.max_steps", "1")
    capsys.readouterr()
    fit(tmp_path / "whole", *words, "--evaluation.strategy", "none", config="lora.yaml")
    assert "was trained with model.qlora.bits 4, here None.\n" in capsys.readouterr().out
    fit(tmp_path / "same", *words, "--evaluation.strategy", "none", config=CONFIG)
    assert "was trained with" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_exact(fit: Callable[..., Path], run: Path, tmp_path: Path, kind: str) -> None:
    """With validations before it, in which bitsandbytes computes otherwise than in training, and LoRA's dropout on."""
    words = (*KEEP_ALL, *IN_PARTS, *KINDS[kind])
    whole = run if kind == "nf4" else fit(tmp_path / "whole", *words, config=CONFIG)
    for step in (2, 4, 6) if kind == "nf4" else (4,):
        start = ("--ckpt_path", str(whole / f"step-{step:08d}"))
        part = fit(tmp_path / f"from-{step}", *words, *start, config=CONFIG)
        assert same_weights(part / "step-00000008", whole / "step-00000008"), step
        assert [row for row in metrics(whole) if int(row["step"]) > step] == metrics(part)
        ours, theirs = (torch.load(one / "step-00000008" / "trainer.pt", weights_only=True) for one in (part, whole))
        assert str(ours["optimizer_states"]) == str(theirs["optimizer_states"])


def test_a_killed_run_goes_on_to_the_same_bits(
    fit_arguments: Callable[..., list[str]], run: Path, tmp_path: Path
) -> None:
    words = fit_arguments(tmp_path, *KEEP_ALL, *IN_PARTS, config=CONFIG)
    line = [sys.executable, "-m", "mft_lightning", "fit", *words]
    with subprocess.Popen(line, cwd=ROOT, env=user_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if text.startswith("step 5/"):
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and "step-00000008" not in checkpoints(tmp_path)
    assert main(["fit", *words, "--ckpt_path", "last"]) == 0
    assert same_weights(tmp_path / "step-00000008", run / "step-00000008")
    assert metrics(tmp_path) == metrics(run)


def test_activations_computed_again_are_the_same(fit: Callable[..., Path], run: Path, tmp_path: Path) -> None:
    again = fit(tmp_path, *KEEP_ALL, *IN_PARTS, "--model.checkpoint_activations", "true", config=CONFIG)
    assert differ(metrics(run), metrics(again)) < 1e-6


def test_two_processes_take_the_steps_of_one(
    fit_arguments: Callable[..., list[str]], fit: Callable[..., Path], tmp_path: Path
) -> None:
    lines = []
    for bits in ("4", "8"):
        words = ("--model.qlora.bits", bits, "--model.lora.dropout", "0", "--trainer.max_steps", "4", *IN_PARTS)
        fit(tmp_path / f"one{bits}", *words, config=CONFIG)
        two = fit_arguments(tmp_path / f"two{bits}", *words, "--trainer.strategy", "ddp", config=CONFIG)
        lines.append(["fit", *two])
    in_series(2, lines, tmp_path)
    for bits in ("4", "8"):
        assert differ(metrics(tmp_path / f"one{bits}"), metrics(tmp_path / f"two{bits}")) < 1e-5


def test_a_checkpoint_is_asked_on_the_base_it_was_trained_on(run: Path) -> None:
    """As transformers quantises that base, and peft puts the adapter on it."""
    last = run / "step-00000008"
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    expected = _opened(last, quantization_config=config, device_map={"": "cpu"})
    ours = load_model(last, "--model", dtype="float32").model
    with torch.no_grad():
        assert torch.equal(ours(input_ids=IDS).logits, expected(input_ids=IDS).logits)
        whole = _opened(last)(input_ids=IDS).logits
        assert (whole - ours(input_ids=IDS).logits).abs().max() > 1e-4
    answers = [model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False) for model in (ours, expected)]
    assert torch.equal(*answers)
    assert main(["generate", "--model", str(last), "--prompt", "Add two numbers.", "--max_new_tokens", "8"]) == 0


def _opened(checkpoint: Path, **options: Any) -> PeftModel:
    """As a stranger opens it, with what a CPU's evaluation in bfloat16 would round left alone."""
    base = AutoModelForCausalLM.from_pretrained(checkpoint.parent / "base", dtype=torch.float32, **options)
    model = PeftModel.from_pretrained(base, checkpoint).eval()
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def test_validate_measures_what_the_run_measured(
    fit_arguments: Callable[..., list[str]], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = next(row["val/loss"] for row in reversed(metrics(run)) if row["val/loss"])
    capsys.readouterr()
    words = fit_arguments(run, *IN_PARTS, "--ckpt_path", "last", config=CONFIG)
    assert main(["validate", *words, "--evaluation.exact_match_per_task", "1"]) == 0
    assert f"val/loss {float(last):.6f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model.qlora.bits", "8"), "model.qlora.bits was 4, is 8. Set them back."),
        (("--model.qlora.quant_type", "fp4"), "model.qlora.quant_type was 'nf4', is 'fp4'"),
        (("--model.qlora.double_quant", "false"), "model.qlora.double_quant was True, is False"),
        (("--trainer.precision", "bf16-mixed"), "is 'bfloat16' (it follows trainer.precision where it is not"),
        (("--model.peft_type", "lora", "--model.qlora", "{}"), "run: model.peft_type was 'qlora', is 'lora'. Set"),
        (("--seed_everything", "7"), "frozen base (digest) was"),
    ],
)
def test_another_quantisation_is_another_run(
    refused: Callable[..., str], run: Path, words: tuple[str, ...], message: str
) -> None:
    said = refused(run, *words, "--ckpt_path", "last", config=CONFIG, command="validate")
    assert message in said and "None" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--trainer.strategy", "fsdp"), "trainer.strategy: fsdp cuts tensors"),
        (
            ("--parallel.tensor_parallel_size", "2", "--trainer.devices", "2"),
            "parallel.tensor_parallel_size: 2 cuts tensors",
        ),
        (
            ("--trainer.strategy.class_path", "lightning.pytorch.strategies.FSDPStrategy"),
            "trainer.strategy: FSDPStrategy cuts tensors",
        ),
        (("--trainer.precision", "64-true"), "trainer.precision: 64-true is too much for 4 bits"),
        (("--model.qlora.bits", "8", "--model.qlora.quant_type", "fp4"), "model.qlora.quant_type: is of 4 bits"),
    ],
)
def test_what_cannot_work_is_refused_before_data_is_read(
    refused: Callable[..., str], tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    assert message in refused(tmp_path / "run", *words, "--data.data_paths", "[/gone]", config=CONFIG)


def test_zero_is_refused_too() -> None:
    """Asked of a strategy that was not made, for which DeepSpeed would have to be installed."""
    given = object.__new__(DeepSpeedStrategy)
    with pytest.raises(UserError, match="DeepSpeedStrategy cuts tensors"):
        make_strategy(
            given,
            ParallelSettings(),
            layout=Layout(1, 1, 1),
            precision="32-true",
            command=(),
            undivided="model.peft_type: qlora",
        )


def test_without_bitsandbytes_it_says_what_to_install(
    refused: Callable[..., str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("mft_lightning.model.quantized.find_spec", lambda name: None)
    install = 'needs bitsandbytes, which is not installed. Install it with pip install -e ".[qlora]"'
    assert install in refused(tmp_path / "run", "--data.data_paths", "[/gone]", config=CONFIG)
    assert main(["generate", "--model", str(run / "step-00000008"), "--prompt", "x"]) == 1
    assert install in capsys.readouterr().err
    merged = ["merge", "--adapter", str(run / "step-00000008"), "--output", str(tmp_path / "merged")]
    assert main(merged) == 0  # into the base as it was before


def test_a_paged_optimizer_needs_a_gpu_and_resumes_as_the_other_does(
    fit: Callable[..., Path], refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU bitsandbytes does without pages; how a run saves and loads is tried there all the same."""
    paged = ("--model.optimizer", "paged_adamw", *IN_PARTS, "--trainer.max_steps", "4", *KEEP_ALL)
    words = ("--data.data_paths", "[/gone]", *paged)
    assert "model.optimizer: paged_adamw moves its state" in refused(tmp_path / "refused", *words, config=CONFIG)
    monkeypatch.setattr("mft_lightning.run_config.check_pages", lambda accelerator: None)
    assert "paged_adamw cannot be" in refused(tmp_path / "refused", *words, "--trainer.strategy", "fsdp")
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        whole = fit(tmp_path / "whole", *paged, config=CONFIG)
        part = fit(tmp_path / "part", *paged, "--ckpt_path", str(whole / "step-00000002"), config=CONFIG)
    assert same_weights(part / "step-00000004", whole / "step-00000004")
    plain = (*paged, "--model.optimizer", "adamw")
    assert differ(metrics(fit(tmp_path / "plain", *plain, config=CONFIG)), metrics(whole)) < 1e-5
    fit(tmp_path / "changed", *plain, "--ckpt_path", str(whole / "step-00000002"), config=CONFIG)
