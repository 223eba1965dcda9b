"""What ranks write in parts is read as it was, in however many files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from mft_lightning.model.weight_files import MODEL_SHARDS, OPTIMIZER_SHARDS, ShardFiles
from mft_lightning.training.shards import ShardWriter, joined, split_off, staged

KIND = 12  # numbers of a tensor


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def checkpoint() -> dict[str, object]:
    torch.manual_seed(0)
    weights = {f"weight {number}": torch.randn(3, 4) for number in range(5)}
    moments = {
        n: {"step": torch.tensor(float(n)), "exp_avg": torch.randn(KIND), "exp_avg_sq": torch.rand(KIND)}
        for n in range(5)
    }
    return {
        "global_step": 7,
        "state_dict": weights,
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 0.1}]}],
    }


@pytest.mark.parametrize("at_once", [True, False])
def test_a_checkpoint_in_several_files_is_the_same(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    monkeypatch.setattr("mft_lightning.training.shards.PART", 2 * 4 * KIND)
    whole = checkpoint()
    small, weights, moments = split_off(whole)
    assert small.keys() == {"global_step", "optimizer_states"}
    assert all(list(values) == ["step"] for values in small["optimizer_states"][0]["state"].values())
    parts = {MODEL_SHARDS: staged(weights), OPTIMIZER_SHARDS: staged(moments)}
    for tensor in weights.values():
        tensor.zero_()  # what was staged is a copy
    ShardWriter().write(tmp_path, parts)
    assert len(list((tmp_path / MODEL_SHARDS).iterdir())) == 3
    assert len(list((tmp_path / OPTIMIZER_SHARDS).iterdir())) == 5
    expected = checkpoint()
    files = ShardFiles(tmp_path / MODEL_SHARDS)
    assert {name: files.shape(name) for name in files.names()} == dict.fromkeys(expected["state_dict"], (3, 4))
    assert all(torch.equal(files.read(name), value) for name, value in expected["state_dict"].items())
    found = joined(small, tmp_path, at_once=at_once)["optimizer_states"][0]
    wanted = expected["optimizer_states"][0]
    assert found["param_groups"] == wanted["param_groups"]
    for number, values in wanted["state"].items():
        assert found["state"][number].keys() == values.keys()
        assert all(torch.equal(found["state"][number][name], value) for name, value in values.items())


def test_a_part_that_is_missing_is_no_zero(alone: None, tmp_path: Path) -> None:
    ShardWriter().write(tmp_path, {MODEL_SHARDS: {"one": torch.ones(4)}})
    files = ShardFiles(tmp_path / MODEL_SHARDS)
    files._parts["one"] = [(file, (4,)) for file, _ in files._parts["one"]]  # as if the first half were gone
    with pytest.raises(ValueError, match="parts of one are missing"):
        files.read("one")
