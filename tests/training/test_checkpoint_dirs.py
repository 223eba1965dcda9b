"""Which checkpoints are kept, and which one ``--ckpt_path`` means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.errors import UserError
from mft_lightning.training.checkpoint_choice import (
    find_best,
    find_checkpoints,
    resolve_checkpoint,
)
from mft_lightning.training.checkpoint_dirs import (
    FORMAT_VERSION,
    CheckpointInfo,
    directory_name,
    read_metadata,
    write_description,
    write_metadata,
)
from mft_lightning.training.retention import expired
from mft_lightning.training.same_run import check_same_run

FINGERPRINT = {"seed_everything": 42, "data.data_paths (tasks)": ["a", "b"], "frozen base (digest)": None}


def info(step: int, loss: float | None = None, epoch_end: bool = False) -> CheckpointInfo:
    return CheckpointInfo(Path(directory_name(step)), step, epoch_end, {} if loss is None else {"val/loss": loss})


def write(output_dir: Path, step: int, loss: float | None = None) -> None:
    directory = output_dir / directory_name(step)
    directory.mkdir(parents=True)
    metrics = {} if loss is None else {"val/loss": loss}
    metadata = {
        "format": FORMAT_VERSION,
        "step": step,
        "epoch_end": False,
        "metrics": metrics,
        "fingerprint": FINGERPRINT,
    }
    metadata |= {"chat_format": {"normalize_punctuation": False}, "processes": 1}
    (directory / "trainer.pt").touch()
    write_metadata(directory, metadata)


def steps(checkpoints: list[CheckpointInfo]) -> list[int]:
    return sorted(checkpoint.step for checkpoint in checkpoints)


def test_a_limit_of_two_keeps_the_best_and_the_latest() -> None:
    found = [info(10, 3.0), info(20, 1.0), info(30, 2.0), info(40)]
    assert steps(expired(found, 2, "val/loss", "min")) == [10, 30]
    assert steps(expired(found, 3, "val/loss", "min")) == [10]
    assert steps(expired(found, 1, "val/loss", "min")) == [10, 20, 30]
    assert steps(expired(found, 2, "val/loss", "max")) == [20, 30]
    assert expired(found, None, "val/loss", "min") == []


def test_without_validation_the_most_recent_are_kept() -> None:
    assert steps(expired([info(s) for s in (10, 20, 30)], 2, None, "min")) == [10]


def test_epoch_checkpoints_neither_rotate_nor_count() -> None:
    found = [info(10, 0.5, epoch_end=True), info(20, 2.0), info(30, 3.0), info(40, 4.0)]
    assert steps(expired(found, 2, "val/loss", "min")) == [20]


@given(
    losses=st.lists(st.tuples(st.none() | st.floats(0, 9), st.booleans()), min_size=1, max_size=12),
    limit=st.integers(1, 5),
)
@settings(deadline=None)
def test_latest_and_best_always_survive_within_the_limit(losses: list[tuple[float | None, bool]], limit: int) -> None:
    found = [info(10 * (i + 1), loss, epoch_end) for i, (loss, epoch_end) in enumerate(losses)]
    gone = expired(found, limit, "val/loss", "min")
    kept = [checkpoint for checkpoint in found if checkpoint not in gone]
    rotating = [checkpoint for checkpoint in found if not checkpoint.epoch_end]
    assert len([c for c in kept if not c.epoch_end]) == min(limit, len(rotating))
    assert all(checkpoint in kept for checkpoint in found if checkpoint.epoch_end)
    if rotating:
        assert rotating[-1] in kept
    if limit > 1:
        best = find_best(found, "val/loss", "min")
        assert best is None or best in kept


def test_the_earlier_of_equals_is_the_best_and_nan_never_is() -> None:
    assert find_best([info(10, 1.0), info(20, 1.0), info(30, float("nan"))], "val/loss", "min").step == 10
    assert find_best([info(30, float("nan"))], "val/loss", "min") is None


def test_last_and_best_and_a_directory_are_resolved(tmp_path: Path) -> None:
    for step, loss in ((10, 2.0), (20, 1.0), (30, None)):
        write(tmp_path, step, loss)
    assert resolve_checkpoint("last", tmp_path, "val/loss", "min").step == 30
    assert resolve_checkpoint("best", tmp_path, "val/loss", "min").step == 20
    assert resolve_checkpoint(str(tmp_path / directory_name(10)), tmp_path, "val/loss", "min").step == 10
    assert steps(find_checkpoints(tmp_path)) == [10, 20, 30]


def test_last_without_a_checkpoint_starts_anew_and_others_are_errors(tmp_path: Path) -> None:
    assert resolve_checkpoint("last", tmp_path, "val/loss", "min") is None
    with pytest.raises(UserError, match="no checkpoint"):
        resolve_checkpoint("best", tmp_path, "val/loss", "min")
    with pytest.raises(UserError, match="is no directory"):
        resolve_checkpoint(str(tmp_path / "gone"), tmp_path, "val/loss", "min")
    with pytest.raises(UserError, match="is no checkpoint"):
        resolve_checkpoint(str(tmp_path), tmp_path, "val/loss", "min")


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 10)
    file = tmp_path / directory_name(10) / "checkpoint.json"
    write_description(file, json.loads(file.read_text()) | {"format": 99})
    with pytest.raises(UserError, match="format 99"):
        resolve_checkpoint("last", tmp_path, "val/loss", "min")


@pytest.mark.parametrize("content", ["[]", "{", "null", '{"format": 3', '{"format": 3}', '{"format": 3, "step": "10"}'])
def test_a_damaged_description_is_no_checkpoint(tmp_path: Path, content: str) -> None:
    write(tmp_path, 10)
    (tmp_path / directory_name(10) / "checkpoint.json").write_text(content)
    with pytest.raises(UserError, match=r"checkpoint\.json"):
        resolve_checkpoint("last", tmp_path, "val/loss", "min")


@pytest.mark.parametrize("key", FINGERPRINT)
def test_another_run_s_checkpoint_is_refused_and_the_key_named(tmp_path: Path, key: str) -> None:
    write(tmp_path, 10)
    directory = tmp_path / directory_name(10)
    check_same_run(directory, FINGERPRINT)
    with pytest.raises(UserError) as caught:
        check_same_run(directory, {**FINGERPRINT, key: "other"})
    assert f"{key} was {FINGERPRINT[key]!r}, is 'other'" in str(caught.value)
    assert all(other not in str(caught.value) for other in FINGERPRINT if other != key)


def test_what_goes_with_another_kind_of_training_is_not_asked_back(tmp_path: Path) -> None:
    """Only what a user can set is named, the cause first; a base that differs too is."""
    qlora = {"model.lora": "r 8", "frozen base (digest)": "a", "model.qlora.bits": 4, "model.qlora.quant_type": "nf4"}
    nothing = dict.fromkeys(("model.qlora.bits", "model.qlora.quant_type"))
    write(tmp_path, 10)
    directory = tmp_path / directory_name(10)
    write_metadata(directory, read_metadata(directory) | {"fingerprint": qlora})
    check_same_run(directory, {"data.role_tokens": "text"})
    for now, expected in (
        (qlora | nothing, "model.peft_type was 'qlora', is 'lora'"),
        (dict.fromkeys(qlora), "model.peft_type was 'qlora', is None"),
        (
            qlora | nothing | {"model.lora": "r 4"},
            "model.peft_type was 'qlora', is 'lora'; model.lora was 'r 8', is 'r 4'",
        ),
        (qlora | nothing | {"model.qlora.bits": 8}, "model.qlora.bits was 4, is 8"),
        (qlora | {"frozen base (digest)": None}, "frozen base (digest) was 'a', is None"),
    ):
        with pytest.raises(UserError) as caught:
            check_same_run(directory, now)
        assert f"belongs to another run: {expected}. Set them back." in str(caught.value)


def test_a_merged_model_beside_the_checkpoints_is_none_of_them(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (tmp_path / directory_name(4)).rename(tmp_path / "step-00000004-merged")
    write(tmp_path, 8)
    assert steps(find_checkpoints(tmp_path)) == [8]
