"""``estimate`` tells what a run needs, and what would need less."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mft_lightning.cli import main
from mft_lightning.data import token_cache
from tests.integration.conftest import ROOT

LORA = ("--model.peft_type", "lora")
Estimate = Callable[..., str]


@pytest.fixture
def estimate(capsys: pytest.CaptureFixture[str]) -> Estimate:
    """What ``estimate`` prints of ``configs/full.yaml`` with further words."""

    def run(*words: str, config: str = "full.yaml") -> str:
        capsys.readouterr()
        assert main(["estimate", "--config", str(ROOT / "configs" / config), *words]) == 0
        found = capsys.readouterr()
        assert found.err == ""
        return found.out

    return run


def as_words(keys: dict[str, Any]) -> list[str]:
    return [f"--{key}={str(value).lower()}" for key, value in keys.items()]


def test_it_reads_a_configuration_and_no_weights_and_no_data(
    estimate: Estimate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("data is read")

    monkeypatch.setattr(token_cache, "read_blocks", read)
    shutil.copytree(ROOT / "examples" / "model", tmp_path / "model")
    words = ("--model.pretrained_model_path", str(tmp_path / "model"), "--model.init", "pretrained")
    said = estimate(*words, "--device-memory", "0.1")
    assert not list((tmp_path / "model").glob("*.safetensors"))
    lines = said.splitlines()
    assert "4 micro-batch(es) of 8 on each device, packed end to end" in said
    assert "conversations of 512 tokens (data.seq_length; --length if they are shorter), all of them supervised" in said
    parts = ("weights", "gradients", "optimizer", "activations", "loss", "total", "peak", "fits")
    assert all(any(line.startswith(part) for line in lines) for part in parts)
    assert any(line.startswith("fits") and "no, with 0.1 GiB" in line for line in lines)
    assert any(line.startswith("model.checkpoint_activations: true") for line in lines)


def test_the_parts_add_up_and_every_change_saves_what_it_says(estimate: Estimate) -> None:
    found = json.loads(estimate("--json", "--device-memory", "1"))
    totals = {name: sum(parts.values()) for name, parts in found["moments"].items()}
    assert found["peak"] == max(totals.values()) == totals[found["moment"]] and found["fits"] is True
    peaks = [change["peak"] for change in found["changes"] if len(change["keys"]) < 3]
    assert len(peaks) >= 5 and peaks == sorted(peaks)
    for change in found["changes"]:
        assert change["saves"] == found["peak"] - change["peak"] > 0
        again = json.loads(estimate("--json", *as_words(change["keys"])))
        assert again["peak"] == change["peak"]
        if change["same"]:
            step = again["micro_batches"] * again["conversations"] * again["devices"]
            assert step == found["micro_batches"] * found["conversations"] * found["devices"]


@pytest.mark.parametrize(
    "words",
    [
        ("--data.total_train_batch_size", "null", "--data.gradient_accumulation_steps", "2"),
        ("--data.total_train_batch_size", "null"),
        ("--trainer.devices", "4", "--trainer.strategy", "fsdp", "--parallel.reshard_after_forward", "false"),
        ("--trainer.devices", "4", "--trainer.strategy", "fsdp", "--parallel.tensor_parallel_size", "2"),
        ("--trainer.devices", "2", "--model.attn_implementation", "eager", "--data.padding_mode", "padding"),
        ("--data.total_train_batch_size", "null", "--data.total_train_batch_tokens", "16384"),
    ],
)
def test_changes_hold_whatever_was_given(estimate: Estimate, words: tuple[str, ...]) -> None:
    found = json.loads(estimate("--json", *words))
    assert found["changes"]
    for change in found["changes"]:
        assert json.loads(estimate("--json", *words, *as_words(change["keys"])))["peak"] == change["peak"]


def test_devices_need_not_be_here(estimate: Estimate) -> None:
    words = ("--device", "cuda", "--trainer.accelerator", "gpu", "--trainer.strategy", "fsdp")
    few, many = (json.loads(estimate("--json", *words, "--devices", n, config="lora.yaml")) for n in ("2", "16"))
    assert (few["devices"], many["devices"], many["device"]) == (2, 16, "cuda")
    for part in ("weights", "gradients", "optimizer"):
        assert many["moments"]["optimizer"][part] < few["moments"]["optimizer"][part] / 7


def test_devices_of_several_nodes_are_advised_by_node(estimate: Estimate) -> None:
    words = ("--trainer.strategy", "fsdp", "--trainer.devices", "2", "--trainer.num_nodes", "2")
    found = json.loads(estimate("--json", *words))
    (change,) = [one for one in found["changes"] if one["keys"].keys() == {"trainer.devices"}]
    assert change["keys"] == {"trainer.devices": 4} and found["devices"] == 4
    again = json.loads(estimate("--json", *words, "--trainer.devices", "4"))
    assert (again["devices"], again["peak"]) == (8, change["peak"])


def test_a_micro_batch_holds_what_is_dealt_to_it(estimate: Estimate) -> None:
    """Not all that it might hold."""
    words = ("--data.per_device_train_batch_size", "8", "--data.total_train_batch_size", "6")
    found = json.loads(estimate("--json", *words, "--devices", "2"))
    assert (found["micro_batches"], found["conversations"]) == (1, 3)


def test_devices_that_share_layers_hold_a_part_of_them_and_of_the_head(estimate: Estimate) -> None:
    words = ("--device", "cuda", "--devices", "8", "--trainer.strategy", "fsdp")
    words += ("--data.per_device_train_batch_size", "4")
    whole, shared = (json.loads(estimate("--json", *words, "--parallel.tensor_parallel_size", n)) for n in ("1", "2"))
    assert (whole["tensor_parallel_size"], shared["tensor_parallel_size"]) == (1, 2)
    assert shared["devices"] == whole["devices"] == 8
    assert shared["micro_batches"] * shared["conversations"] == 2 * whole["micro_batches"] * whole["conversations"]
    gathered = [found["moments"]["forward begins"]["gathered weights"] for found in (whole, shared)]
    assert 0.5 < gathered[1] / gathered[0] < 0.95
    change = next(one for one in whole["changes"] if "parallel.tensor_parallel_size" in one["keys"])
    assert change["same"] and "each layer shared by 2" in estimate(*words, *as_words(change["keys"]))


def test_adapters_of_all_kinds_count_by_their_rank(estimate: Estimate) -> None:
    """And those that begin with a part of the base keep it on the host, as large as the adapters themselves."""
    started = ("--model.lora.dropout", "0", "--model.lora.use_rslora", "true", "--model.lora.loraplus_lr_ratio", "8")
    plain, pissa, fewer = (
        json.loads(estimate("--json", "--device", "cpu", *started, *words, config="lora.yaml"))["moments"]["optimizer"]
        for words in ((), ("--model.lora.init", "pissa"), ("--model.lora.rank_pattern", '{".*": 48}'))
    )
    assert pissa["weights"] - plain["weights"] == plain["gradients"] > 0
    assert pissa["weights"] - plain["weights"] == 2 * (plain["weights"] - fewer["weights"])


def test_shorter_conversations_need_less(estimate: Estimate) -> None:
    whole, half = (json.loads(estimate("--json", "--length", length)) for length in ("512", "256"))
    assert half["peak"] < 0.6 * whole["peak"] and half["length"] == 256


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--devices", "0"), "--devices: 0 is less than 1"),
        (("--length", "513"), "--length: 513 is no number from 2 to data.seq_length, 512"),
        (("--device", "tpu"), "--device: tpu is none of cpu, cuda"),
        (("--device-memory", "-1"), "--device-memory: -1 is no number above 0"),
        (("--trainer.strategy", "ddp_spawn"), "trainer.strategy: 'ddp_spawn' is refused; it takes one of auto"),
        (("--parallel.cpu_offload", "true"), "parallel.cpu_offload: is an option of trainer.strategy: fsdp"),
        (
            ("--trainer.strategy.class_path", "lightning.pytorch.strategies.DDPStrategy"),
            "trainer.strategy: what DDPStrategy needs is not known. Estimate with ddp or fsdp.",
        ),
        (
            ("--parallel.tensor_parallel_size", "2", "--devices", "3"),
            "parallel.tensor_parallel_size: 2 does not divide the 3 device(s)",
        ),
        (
            ("--parallel.tensor_parallel_size", "3", "--devices", "6"),
            "parallel.tensor_parallel_size: 3 does not divide the model's num_attention_heads",
        ),
        ((*LORA, "--model.lora.use_dora", "true"), "model.lora.use_dora: what it needs is not known"),
        (
            (*LORA, "--model.lora.rank_pattern", '{"0.attention.dense": 2}'),
            "model.lora.rank_pattern: what layers of different ranks need is not known",
        ),
        (("--data.seq_length", "1024"), "data.seq_length: 1024 is more than the 512 positions"),
        (("--data.seq_lenght", "5"), "data.seq_lenght: there is no such key. The nearest is data.seq_length."),
    ],
)
def test_bad_input_is_one_message(
    refused: Callable[..., str], tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    said = refused(tmp_path / "out", *words, command="estimate")
    assert message in said and said.count("\n") == 1
