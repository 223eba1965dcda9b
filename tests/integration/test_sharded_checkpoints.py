"""Checkpoints that every rank writes its part of resume in every layout, and become ordinary models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mft_lightning.cli import main
from tests.integration.conftest import checkpoints, same_weights, weights
from tests.integration.layouts import apart, in_series

STEPS = 6
COMMON = ("--trainer.max_steps", str(STEPS), "--trainer.precision", "64-true", "--evaluation.strategy", "none")
COMMON += ("--checkpoint.checkpointing_steps", "3", "--checkpoint.save_total_limit", "null")
HALF, LAST = "step-00000003", f"step-{STEPS:08d}"
WEIGHTS = 1e-9
PARTS = ("--trainer.strategy", "fsdp", "--checkpoint.sharded", "true")
LORA = ("--model.lora.dropout", "0", "--model.lora.modules_to_save", "[embed_in,lm_head]")
SHARED = ("--parallel.tensor_parallel_size", "2")


def consolidated(checkpoint: Path) -> Path:
    output = checkpoint.parent / f"whole-{checkpoint.name}"
    assert main(["consolidate", "--checkpoint", str(checkpoint), "--output", str(output)]) == 0
    return output


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_they_resume_in_every_layout_and_make_the_same_model(
    fit: Callable[..., Path], fit_arguments: Callable[..., list[str]], tmp_path: Path, kind: str
) -> None:
    words = (*COMMON, *(LORA if kind == "lora" else ()))
    one = fit(tmp_path / "one", *words, config=f"{kind}.yaml")
    reference = weights(one / LAST)

    def line(name: str, *more: str, of: str | None = None) -> list[str]:
        resumed = ("--ckpt_path", str(tmp_path / of / HALF)) if of else ()
        return ["fit", *fit_arguments(tmp_path / name, *words, *more, *resumed, config=f"{kind}.yaml")]

    two = [
        line("fsdp", *PARTS),
        line("fsdp-again", *PARTS, of="fsdp"),
        line("tensor", *PARTS, *SHARED),
        line("fsdp-of-tensor", *PARTS, of="tensor"),
        line("tensor-of-fsdp", *PARTS, *SHARED, of="fsdp"),
        line("ddp-of-fsdp", "--trainer.strategy", "ddp", of="fsdp"),
        line("fsdp-of-one", *PARTS, of="one"),
    ]
    in_series(2, two, tmp_path)
    in_series(4, [line("four-of-tensor", *PARTS, *SHARED, of="tensor")], tmp_path)
    fit(tmp_path / "one-of-fsdp", *words, "--ckpt_path", str(tmp_path / "fsdp" / HALF), config=f"{kind}.yaml")
    parts = ("fsdp", "fsdp-again", "tensor", "fsdp-of-tensor", "tensor-of-fsdp", "fsdp-of-one", "four-of-tensor")
    for name in parts:
        assert checkpoints(tmp_path / name)[-1] == LAST
        assert not list((tmp_path / name / LAST).glob("*.safetensors"))
        assert apart(reference, weights(consolidated(tmp_path / name / LAST))) < WEIGHTS, name
    for name in ("ddp-of-fsdp", "one-of-fsdp"):
        assert apart(reference, weights(tmp_path / name / LAST)) < WEIGHTS, name
    again = [tmp_path / name / f"whole-{LAST}" for name in ("fsdp", "fsdp-again")]
    assert same_weights(*again)  # in the same layout, to the bit


def test_what_is_not_whole_is_not_asked(
    fit_arguments: Callable[..., list[str]],
    fit: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    in_series(2, [["fit", *fit_arguments(tmp_path / "run", *PARTS, "--trainer.max_steps", "2")]], tmp_path)
    checkpoint = tmp_path / "run" / "step-00000002"
    capsys.readouterr()
    assert main(["generate", "--model", str(checkpoint), "--prompt", "a"]) == 1
    assert "is a sharded checkpoint. Make a model of it with" in capsys.readouterr().err
    whole = consolidated(checkpoint)
    assert main(["generate", "--model", str(whole), "--prompt", "a", "--max_new_tokens", "2"]) == 0
    capsys.readouterr()
    assert main(["consolidate", "--checkpoint", str(whole), "--output", str(tmp_path / "new")]) == 1
    assert "is no sharded checkpoint" in capsys.readouterr().err
    shard = next(checkpoint.glob("shards/model/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    assert main(["consolidate", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "new")]) == 1
    assert f"{shard.name} is not as it was written" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_one_process_has_no_parts(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "checkpoint.sharded: is for trainer.strategy: fsdp" in refused(tmp_path, "--checkpoint.sharded", "true")
