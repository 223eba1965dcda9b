"""How evenly a plan deals, against counts made by hand and by the collation itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.data.balance import token_balance
from mft_lightning.data.batch_sizes import BatchSizes
from mft_lightning.data.collate import collate
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.plan import Plan
from tests.data.tables import masked, table_of


def plan(lengths: list[int], *, total: int, per_device: int, packed: bool = True) -> Plan:
    sizes = BatchSizes(total, per_device, None)
    return Plan(lengths=np.array(lengths, dtype=np.int64), sizes=sizes, packed=packed, seed=3)


def test_packed_by_hand() -> None:
    """One step: 10 is dealt alone, 4 + 3 + 2 together; the mean is 9.5."""
    found = token_balance(plan([3, 10, 2, 4], total=4, per_device=2))
    assert (found.lightest.tolist(), found.mean.tolist(), found.heaviest.tolist()) == ([9], [9.5], [10])
    assert found.micros.tolist() == [2] and found.useful.tolist() == [1.0] and found.idle.tolist() == [0]
    assert found.deviation.tolist() == [0.5 / 9.5]
    assert found.summary() == (
        "token balance: worst micro-batch of a step 5.3% off its mean (median over 1 step), 5.3% at the 90th percentile"
    )


def test_padded_by_hand() -> None:
    """Rows of 10 and 4, then of 3 and 2: 20 and 6 tokens computed, 7 of 26 padding."""
    found = token_balance(plan([3, 10, 2, 4], total=4, per_device=2, packed=False))
    assert (found.lightest.tolist(), found.mean.tolist(), found.heaviest.tolist()) == ([6], [13], [20])
    assert found.useful.tolist() == [19 / 26]
    assert found.summary().endswith("53.8% at the 90th percentile; 26.9% of the computed tokens are padding")


def test_the_short_last_batch_counts_only_where_it_is_alone() -> None:
    many = token_balance(plan([5] * 4 * 8 + [5] * 3, total=8, per_device=2))
    assert many.short.tolist() == [False] * 4 + [True] and many.deviation[-1] > 0 == many.quantile(1.0)
    assert "median over 4 steps" in many.summary()
    alone = token_balance(plan([5, 9, 7], total=8, per_device=2))
    assert alone.short.tolist() == [False] and "median over 1 step)" in alone.summary()
    full = token_balance(plan([5] * 16, total=8, per_device=2))
    assert not full.short.any()
    cut = token_balance(plan([5] * 35, total=8, per_device=2), steps=3)
    assert len(cut.mean) == 3 and cut.steps_per_epoch == 5 and not cut.short.any()


def test_ranks_without_a_conversation_are_told_of() -> None:
    found = token_balance(plan([6] * 10, total=5, per_device=1), world=8)
    assert found.micros.tolist() == [8, 8] and found.idle.tolist() == [3, 3] and found.lightest.tolist() == [0, 0]
    assert found.summary().endswith("; 3 of 8 micro-batches have no conversation")


def test_nothing_to_balance() -> None:
    assert token_balance(plan([3, 4, 5], total=1, per_device=1)).summary() == (
        "token balance: one micro-batch a step, nothing to balance"
    )
    assert token_balance(plan([], total=1, per_device=1)).summary() == "token balance: there is no step"


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    total=st.integers(1, 12),
    per_device=st.integers(1, 4),
    world=st.integers(1, 4),
    packed=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_tokens_are_those_that_the_collation_lays_out(
    lengths: list[int], total: int, per_device: int, world: int, packed: bool
) -> None:
    made = plan(lengths, total=total, per_device=per_device, packed=packed)
    found = token_balance(made, world)
    table = table_of([(0, masked([0] * length, [1] * length)) for length in lengths])
    for step in range(made.steps_per_epoch):
        batch = made.global_batch(0, step)
        dealt = [micro for rank in range(world) for micro in made.deal(batch, rank, world)]
        sizes = [
            collate(table, micro, packed=packed, pad_id=0).input_ids.numel() if len(micro) else 0 for micro in dealt
        ]
        assert found.lightest[step] == min(sizes) and found.heaviest[step] == max(sizes)
        assert found.mean[step] == pytest.approx(np.mean(sizes)) and found.micros[step] == len(sizes)
        assert found.useful[step] == pytest.approx(made.lengths[batch].sum() / sum(sizes))
    assert found.short.sum() <= 1 and found.counted.any()


def test_real_data_is_dealt_evenly(real_tasks: list[str], pythia: Path) -> None:
    datamodule = MFTDataModule(
        data_paths=real_tasks,
        tokenizer_path=str(pythia),
        seq_length=1024,
        total_train_batch_size=64,
        per_device_train_batch_size=8,
    )
    for world, per_device in ((1, 8), (8, 8), (2, 8)):
        assert per_device == datamodule.batch_sizes.per_device
        found = token_balance(datamodule.plan, world)
        assert (found.micros[found.counted] == 8).all() and 0 < found.quantile(0.5) < 0.05
