"""Which conversations are trained on and evaluated, and what is advised where there are none."""

from collections.abc import Callable, Sequence
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch

from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.errors import UserError
from tests.conftest import ROOT

LEFT_OUT = {"prompt": "long " * 600, "answer": "a"}


@pytest.fixture
def module(write_task: Callable[..., str]) -> Callable[..., MFTDataModule]:
    """Of tasks with 20 conversations each; ``few`` has one, which trains; that of ``valid/bad`` is too long."""

    def make(names: Sequence[str], valid: Sequence[str] = (), **keys: Any) -> MFTDataModule:
        def written(name: str) -> str:
            records = [{"prompt": f"{name} {i}", "answer": "a"} for i in range({"few": 1}.get(name, 20))]
            return write_task(name, [LEFT_OUT] if name == "valid/bad" else records)

        paths, directories = [written(name) for name in names], [written(f"valid/{name}") for name in valid]
        return MFTDataModule(
            data_paths=paths,
            valid_data_paths=directories or None,
            tokenizer_path=str(ROOT / "examples" / "model"),
            seq_length=256,
            **keys,
        )

    return make


def sizes(module: MFTDataModule) -> list[int]:
    return [len(module.table(split)) for split in ("train", "valid", "test")]


@pytest.mark.parametrize(
    ("valid", "data_split", "expected"),
    [
        ([], None, [38, 2, 0]),
        ([], "80,10,10", [32, 4, 4]),
        (["one", "two"], None, [40, 40, 0]),
        (["one", "two"], "95,0,5", [38, 40, 2]),
        (["one"], [3, 0, 1], [30, 20, 10]),
        (["one"], "1,0,0", [40, 20, 0]),
    ],
)
def test_validation_directories_take_the_place_of_a_validation_share(
    module: Callable[..., MFTDataModule], valid: list[str], data_split: Any, expected: list[int]
) -> None:
    assert sizes(module(["one", "two"], valid, data_split=data_split)) == expected


@pytest.mark.parametrize("data_split", ["95,5,0", [90, 5, 5], "99,0.5,0.5"])
def test_a_validation_share_beside_validation_directories_is_refused(
    module: Callable[..., MFTDataModule], data_split: Any
) -> None:
    with pytest.raises(UserError) as caught:
        module(["one"], ["one"], data_split=data_split)
    assert str(caught.value) == (
        f"data.data_split: {data_split!r} gives validation a share, and data.valid_data_paths directories of its own. "
        "Make the share 0, as in '95,0,5', or leave data.data_split out (null) to train on all."
    )


def test_an_empty_split_is_refused_not_passed_over(module: Callable[..., MFTDataModule]) -> None:
    with pytest.raises(UserError, match=r"^data\.data_split: '' is not three percentages"):
        module(["one"], data_split="")


NONE = "or set evaluation.strategy: none to train without validations."
EXCLUDE = "or name the task in evaluation.exclude_tasks"


@pytest.mark.parametrize(
    ("split", "names", "valid", "data_split", "key", "missing", "advice"),
    [
        ("test", ["one"], [], None, "data_split", "one", "Train with a share for test, like '90,5,5'."),
        (
            "test",
            ["one", "two"],
            ["one"],
            None,
            "data_split",
            "one, two",
            "Train with a share for test, like '95,0,5'.",
        ),
        ("test", ["one"], ["one"], "1,0,0", "data_split", "one", "Train with a share for test, like '95,0,5'."),
        ("test", ["few"], [], "80,10,10", "data_split", "few", "Train with a larger share for test."),
        (
            "test",
            ["one", "few"],
            [],
            "80,10,10",
            "data_split",
            "few",
            f"Train with a larger share for test, {EXCLUDE}.",
        ),
        (
            *("test", ["one", "few"], ["one"], "90,0,10", "data_split", "few"),
            f"Train with a larger share for test, {EXCLUDE}.",
        ),
        (
            *("valid", ["one"], [], "1,0,1", "data_split", "one"),
            f"Train with a share for valid, like '95,5,0', or give data.valid_data_paths, {NONE}",
        ),
        (
            *("valid", ["one", "few"], [], "80,10,10", "data_split", "few"),
            f"Train with a larger share for valid, or give data.valid_data_paths, {EXCLUDE}, {NONE}",
        ),
        (
            *("valid", ["one", "bad"], ["one", "bad"], "80,0,20", "valid_data_paths", "bad"),
            f"Give a directory with conversations, {EXCLUDE}, {NONE}",
        ),
    ],
)
def test_where_nothing_is_left_to_evaluate_the_ways_on_are_told(
    module: Callable[..., MFTDataModule],
    split: str,
    names: list[str],
    valid: list[str],
    data_split: str | None,
    key: str,
    missing: str,
    advice: str,
) -> None:
    made = module(names, valid, data_split=data_split)
    with pytest.raises(UserError) as caught:
        made.check_evaluation(split, in_training=split == "valid")
    assert str(caught.value) == f"data.{key}: no conversation to evaluate ({split}) is left of {missing}. {advice}"


def test_a_task_that_is_excluded_needs_nothing(module: Callable[..., MFTDataModule]) -> None:
    made = module(["one", "few"], data_split="80,0,20", exclude_tasks=["few"])
    made.check_evaluation("test")
    with pytest.raises(UserError, match=r"\(valid\) is left of one\. Train"):
        made.check_evaluation("valid")


def test_an_evaluation_alone_is_not_advised_to_do_without_itself(module: Callable[..., MFTDataModule]) -> None:
    with pytest.raises(UserError) as caught:
        module(["one"], data_split="100,0,0").check_evaluation("valid")
    assert "evaluation.strategy" not in str(caught.value)


def test_a_validation_file_that_is_trained_on_by_a_link_is_refused(
    module: Callable[..., MFTDataModule],
) -> None:
    made = module(["one"], ["one"], data_split="100,0,0")
    (validated,) = made.valid_tasks[0].directory.glob("*.jsonl")
    (trained,) = made.tasks[0].directory.glob("*.jsonl")
    validated.unlink()
    validated.symlink_to(trained)
    with pytest.raises(UserError, match=r"is the same file as .*, by a link"):
        made.setup()


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_batches_for_a_gpu_are_pinned(module: Callable[..., MFTDataModule], device: str, pinned: bool) -> None:
    made = module(["one"], num_workers=0)
    made.setup()
    strategy = Mock(root_device=torch.device(device))
    made.trainer = cast(Any, Mock(num_devices=1, strategy=strategy, distributed_sampler_kwargs=None))
    assert {loader.pin_memory for loader in (made.train_dataloader(), made.val_dataloader())} == {pinned}
