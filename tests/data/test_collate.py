"""Planned conversations to tensors, and the loader that resumes at any step."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data._utils.pin_memory import pin_memory

from mft_lightning.data.batch_sizes import BatchSizes
from mft_lightning.data.chat_encoder import Encoded
from mft_lightning.data.collate import MicroBatch, StepBatch, collate, collate_step
from mft_lightning.data.loader import EvaluationSteps, TrainLoader, TrainSteps
from mft_lightning.data.plan import Plan, deal_evaluation
from mft_lightning.data.token_table import TokenTable
from tests.data.tables import masked, table_of

PAD = 1
TASKS = 3
checked = settings(deadline=None, max_examples=100)


@st.composite
def encodings(draw: st.DrawFn) -> Encoded:
    """A conversation of which some tokens are supervised, never the first; ids may equal the pad id."""
    length = draw(st.integers(2, 12))
    ids = draw(st.lists(st.integers(0, 30), min_size=length, max_size=length))
    supervised = draw(st.lists(st.integers(0, 1), min_size=length - 1, max_size=length - 1).filter(any))
    return masked(ids, [0, *supervised])


ROWS = st.lists(st.tuples(st.integers(0, TASKS - 1), encodings()), min_size=1, max_size=12)


def some_table(count: int = 23) -> TokenTable:
    random = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        length = int(random.integers(2, 20))
        supervised = [0, 1, *random.integers(0, 2, length - 2).tolist()]
        rows.append((int(random.integers(0, TASKS)), masked(random.integers(2, 99, length).tolist(), supervised)))
    return table_of(rows)


def tensors(micro: MicroBatch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(micro).items() if isinstance(value, torch.Tensor)}


def plain(batch: Any) -> Any:
    """A batch as nested lists, to compare."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, MicroBatch | StepBatch):
        return {name: plain(value) for name, value in vars(batch).items()}
    return [plain(item) for item in batch] if isinstance(batch, list) else batch


# --- the table


@given(rows=ROWS)
@checked
def test_a_table_gives_back_its_rows(rows: list[tuple[int, Encoded]]) -> None:
    table = table_of(rows)
    assert len(table) == len(rows)
    for index, (task, encoded) in enumerate(rows):
        ids, supervised = table.row(index)
        assert (ids.tolist(), supervised.tolist()) == (encoded.input_ids, encoded.supervised)
        assert table.tasks[index] == task and table.n_supervised[index] == sum(encoded.supervised)
        assert table.lengths[index] == len(encoded.input_ids)


def test_a_table_may_be_empty() -> None:
    table = table_of([])
    assert len(table) == 0 and table.lengths.tolist() == []


# --- micro-batches


@given(rows=ROWS, packed=st.booleans(), data=st.data())
@checked
def test_targets_are_the_supervised_ids_and_predictors_the_tokens_before_them(
    rows: list[tuple[int, Encoded]], packed: bool, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True))
    micro = collate(table_of(rows), chosen, packed=packed, pad_id=PAD)
    ids, positions = micro.input_ids.flatten().tolist(), micro.position_ids.flatten().tolist()
    found: list[list[tuple[int, int, int]]] = [[] for _ in chosen]
    for place, target, conversation in zip(
        micro.predictors.tolist(), micro.targets.tolist(), micro.conversation.tolist(), strict=True
    ):
        found[conversation].append((positions[place], ids[place], target))
        assert ids[place + 1] == target and positions[place + 1] == positions[place] + 1
    for number, index in enumerate(chosen):
        encoded = rows[index][1]
        assert found[number] == [
            (i - 1, encoded.input_ids[i - 1], encoded.input_ids[i]) for i, one in enumerate(encoded.supervised) if one
        ]
    assert micro.tasks.tolist() == [rows[index][0] for index in chosen]
    assert micro.n_supervised.tolist() == [sum(rows[index][1].supervised) for index in chosen]


@given(rows=ROWS)
@checked
def test_a_packed_row_is_the_conversations_end_to_end_with_positions_that_restart(
    rows: list[tuple[int, Encoded]],
) -> None:
    micro = collate(table_of(rows), range(len(rows)), packed=True, pad_id=PAD)
    assert micro.input_ids.tolist() == [[token for _, encoded in rows for token in encoded.input_ids]]
    assert micro.position_ids.tolist() == [[i for _, encoded in rows for i in range(len(encoded.input_ids))]]
    assert micro.packed_lengths == tuple(len(encoded.input_ids) for _, encoded in rows)


@given(rows=ROWS)
@checked
def test_padded_rows_hold_a_conversation_each_and_padding_at_the_right(rows: list[tuple[int, Encoded]]) -> None:
    micro = collate(table_of(rows), range(len(rows)), packed=False, pad_id=PAD)
    width = max(len(encoded.input_ids) for _, encoded in rows)
    assert micro.input_ids.tolist() == [
        encoded.input_ids + [PAD] * (width - len(encoded.input_ids)) for _, encoded in rows
    ]
    assert micro.position_ids.tolist() == [list(range(width))] * len(rows)
    assert micro.packed_lengths == ()


@pytest.mark.parametrize("packed", [True, False])
def test_an_empty_micro_batch_is_one_pad_token_with_nothing_to_predict(packed: bool) -> None:
    micro = collate(some_table(), [], packed=packed, pad_id=PAD)
    assert micro.input_ids.tolist() == [[PAD]] and micro.position_ids.tolist() == [[0]]
    for name in ("predictors", "targets", "conversation", "tasks", "n_supervised"):
        assert getattr(micro, name).tolist() == [], name


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("indices", [[], [3, 1]])
def test_all_tensors_are_int64(packed: bool, indices: list[int]) -> None:
    micro = collate(some_table(), indices, packed=packed, pad_id=PAD)
    assert len(tensors(micro)) == 8
    assert {name: tensor.dtype for name, tensor in tensors(micro).items() if tensor.dtype != torch.int64} == {}


def test_a_batch_moves_with_all_its_tensors() -> None:
    table = some_table()
    step = collate_step(table, np.arange(5), [np.arange(5)], tasks=TASKS, packed=True, pad_id=PAD)
    moved = step.to("meta")
    assert moved.task_conversations.device.type == moved.task_supervised.device.type == "meta"
    assert {tensor.device.type for micro in moved.micros for tensor in tensors(micro).values()} == {"meta"}
    assert moved.tokens == step.tokens and step.micros[0].input_ids.device.type == "cpu"


def test_a_gpu_fetches_batches_from_pinned_memory_while_the_host_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(("pinned",))
        return tensor

    def sent(tensor: torch.Tensor, device: str, *, non_blocking: bool) -> torch.Tensor:
        asked.append((device, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "to", sent)
    table = some_table()
    step = collate_step(table, np.arange(5), [np.arange(3), np.arange(3, 5)], tasks=TASKS, packed=True, pad_id=PAD)
    pin_memory(step).to("cuda").to("cpu")  # the first as a DataLoader does it
    count = 2 + 2 * len(tensors(step.micros[0]))
    assert asked == [("pinned",)] * count + [("cuda", True)] * count + [("cpu", False)] * count


# --- steps


@given(rows=ROWS, packed=st.booleans(), total=st.integers(1, 8), per_device=st.integers(1, 3), world=st.integers(1, 3))
@checked
def test_every_rank_knows_the_counts_of_the_whole_step(
    rows: list[tuple[int, Encoded]], packed: bool, total: int, per_device: int, world: int
) -> None:
    table = table_of(rows)
    plan = Plan(lengths=table.lengths, sizes=BatchSizes(total, per_device, None), packed=packed, seed=7)
    ranks = [TrainSteps(table, plan, tasks=TASKS, pad_id=PAD, rank=rank, world=world) for rank in range(world)]
    for step in range(plan.steps_per_epoch):
        batch = [rows[index] for index in plan.global_batch(0, step)]
        shares = [steps[0, step] for steps in ranks]
        for share in shares:
            for task in range(TASKS):
                mine = [encoded for number, encoded in batch if number == task]
                assert share.task_conversations[task] == len(mine)
                assert share.task_supervised[task] == sum(sum(encoded.supervised) for encoded in mine)
            assert share.tokens == sum(len(encoded.input_ids) for _, encoded in batch)
            assert share.supervised == sum(sum(encoded.supervised) for _, encoded in batch)
            assert share.squared_lengths == sum(len(encoded.input_ids) ** 2 for _, encoded in batch)
        targets = [target for share in shares for micro in share.micros for target in micro.targets.tolist()]
        wanted = [i for _, e in batch for i, one in zip(e.input_ids, e.supervised, strict=True) if one]
        assert sorted(targets) == sorted(wanted)
        assert len({len(share.micros) for share in shares}) == 1


@pytest.mark.parametrize("packed", [True, False])
def test_evaluation_steps_hold_every_target_once_over_the_ranks(packed: bool) -> None:
    table = some_table()
    targets: list[int] = []
    for rank in range(3):
        steps = EvaluationSteps(table, deal_evaluation(table.lengths, 4, rank, 3), packed=packed, pad_id=PAD)
        assert len(steps) == 2
        targets += [target for i in range(len(steps)) for target in steps[i].targets.tolist()]
    rows = [table.row(index) for index in range(len(table))]
    assert sorted(targets) == sorted(token for ids, supervised in rows for token in ids[supervised == 1].tolist())


# --- the loader's state


EPOCHS = 3


def loader(workers: int = 0, packed: bool = True) -> TrainLoader:
    table = some_table()
    plan = Plan(lengths=table.lengths, sizes=BatchSizes(4, 2, 2), packed=packed, seed=7)
    return TrainLoader(TrainSteps(table, plan, tasks=TASKS, pad_id=PAD), workers)


def stream(source: TrainLoader, batches: int) -> list[Any]:
    """So many batches, over as many epochs as they take; an epoch's iterator is never exhausted, as in Lightning."""
    found: list[Any] = []
    while len(found) < batches:
        left = min(batches - len(found), len(source) - source.cursor.step)
        iterator = iter(source)
        found += [plain(next(iterator)) for _ in range(left)]
    return found


@pytest.fixture(scope="module")
def uninterrupted() -> list[Any]:
    return stream(loader(), EPOCHS * 6)


def test_a_loader_goes_through_epoch_after_epoch_in_another_order(uninterrupted: list[Any]) -> None:
    assert len(loader()) == 6
    direct = [loader().dataset[epoch, step] for epoch in range(EPOCHS) for step in range(6)]
    assert uninterrupted == [plain(batch) for batch in direct]
    assert uninterrupted[:6] != uninterrupted[6:12]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seen", [0, 1, 4, 6, 7, 12])
def test_a_loader_resumed_after_any_step_gives_the_batches_that_were_left(
    uninterrupted: list[Any], seen: int, workers: int
) -> None:
    killed = loader(workers)
    assert stream(killed, seen) == uninterrupted[:seen]
    state = killed.state_dict()
    assert (state["epoch"], state["step"]) == divmod(seen, 6)
    resumed = loader(workers)
    resumed.load_state_dict(state)
    until = min(len(uninterrupted), seen + 7)
    assert stream(resumed, until - seen) == uninterrupted[seen:until]


@pytest.mark.parametrize("epoch", range(EPOCHS))
@pytest.mark.parametrize("step", range(6))
def test_a_loader_starts_at_any_epoch_and_step(uninterrupted: list[Any], epoch: int, step: int) -> None:
    resumed = loader()
    resumed.load_state_dict({"epoch": epoch, "step": step})
    start = epoch * 6 + step
    assert stream(resumed, len(uninterrupted) - start) == uninterrupted[start:]


def test_an_exhausted_iterator_and_an_abandoned_one_leave_the_same_state() -> None:
    exhausted, abandoned = loader(), loader()
    assert len(list(exhausted)) == 6
    stream(abandoned, 6)
    assert exhausted.state_dict() == abandoned.state_dict() == {"epoch": 1, "step": 0}


def test_the_state_counts_what_was_handed_out_not_what_workers_read_ahead() -> None:
    ahead = loader(workers=2)
    iterator = iter(ahead)
    for taken in range(1, 4):
        next(iterator)
        assert (ahead.state_dict()["epoch"], ahead.state_dict()["step"]) == (0, taken)


def test_the_state_is_the_same_whatever_the_layout() -> None:
    packed, padded = loader(packed=True), loader(packed=False)
    stream(packed, 3), stream(padded, 3)
    assert packed.state_dict() == padded.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_draws_nothing_from_the_global_random_state(workers: int) -> None:
    before = torch.get_rng_state()
    stream(loader(workers), 2)
    assert torch.equal(torch.get_rng_state(), before)
