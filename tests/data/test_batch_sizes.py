"""What is given of the batch sizes fills in the rest, or contradicts it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.data.batch_sizes import BatchSizes, derive_batch_sizes
from mft_lightning.data.plan import Plan
from mft_lightning.errors import UserError

checked = settings(deadline=None, max_examples=150)


@pytest.mark.parametrize(
    ("total", "per_device", "accumulation", "devices", "expected"),
    [
        (None, None, None, 1, (32, 8, 4)),
        (32, 8, None, 1, (32, 8, 4)),
        (32, 8, None, 2, (32, 8, 2)),
        (32, 8, 4, 1, (32, 8, 4)),
        (32, 8, 2, 2, (32, 8, 2)),
        (33, 8, None, 1, (33, 8, 5)),
        (33, 8, 5, 1, (33, 8, 5)),
        (3, 8, None, 1, (3, 8, 1)),
        (64, None, None, 1, (64, 8, 8)),
        (3, None, None, 1, (3, 3, 1)),
        (64, None, 4, 2, (64, 8, 4)),
        (6, None, 4, 1, None),
        (None, 4, None, 1, (4, 4, 1)),
        (None, 4, None, 3, (12, 4, 1)),
        (None, 4, 8, 1, (32, 4, 8)),
        (None, 4, 8, 2, (64, 4, 8)),
    ],
)
def test_batch_sizes_fill_each_other_in(
    total: int | None, per_device: int | None, accumulation: int | None, devices: int, expected: tuple[int, ...] | None
) -> None:
    if expected is None:
        with pytest.raises(UserError):
            derive_batch_sizes(total, per_device, accumulation, devices)
    else:
        assert derive_batch_sizes(total, per_device, accumulation, devices) == BatchSizes(*expected)


@pytest.mark.parametrize(
    ("total", "per_device", "accumulation", "devices"),
    [(32, 8, 3, 1), (32, 8, 5, 1), (32, 8, 4, 2), (8, 8, 2, 1)],
)
def test_three_sizes_that_contradict_each_other_are_an_error_that_names_all(
    total: int, per_device: int, accumulation: int, devices: int
) -> None:
    with pytest.raises(UserError, match="Leave one of the three out") as caught:
        derive_batch_sizes(total, per_device, accumulation, devices)
    message = str(caught.value)
    assert f"data.total_train_batch_size: {total}" in message
    assert f"data.per_device_train_batch_size: {per_device}" in message
    assert f"data.gradient_accumulation_steps is {accumulation}" in message


def test_a_contradiction_of_two_sizes_is_not_blamed_on_a_third_that_was_not_given() -> None:
    with pytest.raises(UserError, match=r"data\.gradient_accumulation_steps") as caught:
        derive_batch_sizes(5, None, 4)  # no micro-batch size cuts 5 conversations into exactly 4
    assert "Leave one of the three out" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 10**20])
@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("total", "total_train_batch_size"),
        ("per_device", "per_device_train_batch_size"),
        ("accumulation", "gradient_accumulation_steps"),
        ("tokens", "total_train_batch_tokens"),
    ],
)
def test_a_size_that_no_step_has_is_an_error_that_names_the_key(argument: str, key: str, value: int) -> None:
    sizes: dict[str, int | None] = {"total": None, "per_device": None, "accumulation": None, argument: value}
    with pytest.raises(UserError, match=rf"^data\.{key}: {value} is {'less than 1' if value < 1 else 'more than'}"):
        derive_batch_sizes(**sizes)


@given(total=st.integers(1, 300), per_device=st.integers(1, 40), devices=st.integers(1, 9))
@checked
def test_the_derived_accumulation_is_what_a_full_step_takes(total: int, per_device: int, devices: int) -> None:
    sizes = derive_batch_sizes(total, per_device, None, devices)
    plan = Plan(lengths=np.ones(total, dtype=np.int64), sizes=sizes, packed=False, seed=0)
    assert len(plan.deal(plan.global_batch(0, 0), 0, devices)) == sizes.accumulation
    assert derive_batch_sizes(total, per_device, sizes.accumulation, devices) == sizes


# --- tokens


@pytest.mark.parametrize(
    ("per_device", "accumulation", "expected"),
    [
        (None, None, BatchSizes(None, 8, None, 4096)),
        (3, None, BatchSizes(None, 3, None, 4096)),
        (None, 2, BatchSizes(None, None, 2, 4096)),
    ],
)
@pytest.mark.parametrize("devices", [1, 4])
def test_a_token_budget_goes_with_one_of_micro_batch_and_accumulation(
    per_device: int | None, accumulation: int | None, expected: BatchSizes, devices: int
) -> None:
    assert derive_batch_sizes(None, per_device, accumulation, devices, tokens=4096) == expected


@pytest.mark.parametrize(
    ("total", "per_device", "accumulation", "named"),
    [
        (32, None, None, ["data.total_train_batch_size: 32", "Leave one of them out"]),
        (32, 8, 4, ["data.total_train_batch_size: 32", "Leave one of them out"]),
        (
            None,
            8,
            4,
            [
                "data.per_device_train_batch_size: 8",
                "data.gradient_accumulation_steps: 4",
                "Leave one of the three out",
            ],
        ),
    ],
)
def test_a_token_budget_contradicts_a_number_of_conversations(
    total: int | None, per_device: int | None, accumulation: int | None, named: list[str]
) -> None:
    with pytest.raises(UserError, match=r"^data\.total_train_batch_tokens: 4096 ") as caught:
        derive_batch_sizes(total, per_device, accumulation, tokens=4096)
    assert all(words in str(caught.value) for words in named)


@pytest.mark.parametrize(
    ("sizes", "conversations", "world", "expected"),
    [
        (BatchSizes(None, 8, None, 4096), 33, 1, 5),
        (BatchSizes(None, 8, None, 4096), 33, 4, 2),
        (BatchSizes(None, None, 3, 4096), 33, 4, 3),
        (BatchSizes(None, None, 3, 4096), 1, 4, 3),
        (BatchSizes(32, 8, 4), 7, 1, 1),  # the last of an epoch
    ],
)
def test_micro_batches_of_a_step(sizes: BatchSizes, conversations: int, world: int, expected: int) -> None:
    assert sizes.micro_batches(conversations, world) == expected
