"""Tables: a row for each record, or each task's stream of tokens cut into rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.data.token_store import TokenStore
from mft_lightning.data.token_table import ConcatTable, RecordTable
from tests.data.tables import masked, store_of, table_of

ONE = masked([5, 6, 7, 8, 9], [0, 1, 0, 0, 1])
TWO = masked([1, 2], [0, 1])
RECORDS = st.lists(st.tuples(st.integers(2, 12), st.integers(0, 3)), min_size=1, max_size=15)


def stream(lengths_and_tasks: list[tuple[int, int]]) -> tuple[TokenStore, np.ndarray, list[list[int]]]:
    """A store in which every token is another, the task of each record, and the stream of each task by number."""
    store_rows, streams, token = [], [list[int]() for _ in range(4)], 0
    for length, task in lengths_and_tasks:
        ids = list(range(token, token + length))
        store_rows.append(masked(ids, [0, *[1] * (length - 1)]))
        streams[task] += ids
        token += length
    return store_of(store_rows), np.array([task for _, task in lengths_and_tasks]), streams


def concatenated(lengths_and_tasks: list[tuple[int, int]], width: int) -> tuple[ConcatTable, list[list[int]]]:
    store, tasks, streams = stream(lengths_and_tasks)
    return ConcatTable(store, np.arange(len(store)), tasks, width), streams


# --- a row for each record


def test_a_row_is_the_record_with_a_mask_of_its_spans() -> None:
    table = table_of([(3, TWO), (1, ONE)])
    ids, supervised = table.row(1)
    assert ids.tolist() == ONE.input_ids and supervised.tolist() == ONE.supervised
    assert table.lengths.tolist() == [2, 5] and table.tasks.tolist() == [3, 1] and table.n_supervised.tolist() == [1, 2]
    assert {values.dtype.name for values in (table.lengths, table.tasks, table.n_supervised)} == {"int32"}


@pytest.mark.parametrize(("length", "expected"), [(5, [0, 1, 0, 0, 1]), (4, [0, 1, 0, 0]), (2, [0, 1]), (1, [0])])
def test_a_row_is_cut_from_its_end_with_its_mask(length: int, expected: list[int]) -> None:
    one = np.ones(1, dtype=np.int64)
    ids, supervised = RecordTable(store_of([ONE]), one * 0, one * length, one, one).row(0)
    assert ids.tolist() == ONE.input_ids[:length] and supervised.tolist() == expected


def test_a_row_tells_the_file_and_line_of_its_record() -> None:
    table = table_of([(3, TWO), (1, ONE)])
    assert table.where(1) == [(Path("made.jsonl"), 2)]


def test_rows_are_in_the_order_that_is_asked_for() -> None:
    chosen, ones = np.array([2, 0]), np.ones(2, dtype=np.int64)
    store = store_of([ONE, TWO, masked([4, 4, 4], [0, 0, 1])])
    table = RecordTable(store, chosen, store.lengths[chosen], ones, ones)
    assert [table.row(n)[0].tolist() for n in range(len(table))] == [[4, 4, 4], ONE.input_ids]


def test_the_digest_is_of_what_the_rows_are_and_not_of_where_they_stand() -> None:
    store, zero, five = store_of([ONE, TWO, ONE]), np.array([0]), np.array([5])
    both = np.array([0, 1])
    tables = [
        RecordTable(store, zero, five, zero, five),
        RecordTable(store, zero + 1, five, zero, five),
        RecordTable(store, zero, five - 1, zero, five),
        RecordTable(store, zero, five, zero + 1, five),
        RecordTable(store, both, both + 1, both, both),
        RecordTable(store, both[::-1], both + 1, both, both),
        ConcatTable(store, zero, zero, 5),
    ]
    assert len({table.digest for table in tables}) == len(tables)
    alike = RecordTable(store_of([TWO, ONE], batch=1), zero + 1, five.astype(np.int32), zero, five)
    assert tables[0].digest == alike.digest == RecordTable(store, zero + 2, five, zero, five).digest


# --- streams


@given(RECORDS, st.integers(3, 9))
@settings(deadline=None, max_examples=300)
def test_rows_laid_end_to_end_are_the_stream_of_each_task(records: list[tuple[int, int]], width: int) -> None:
    table, streams = concatenated(records, width)
    assert table.tasks.tolist() == sorted(table.tasks.tolist())
    for task, expected in enumerate(streams):
        rows = [table.row(int(index)) for index in np.flatnonzero(table.tasks == task)]
        assert [token for ids, _ in rows for token in ids.tolist()] == expected
        lengths = [len(ids) for ids, _ in rows]
        assert lengths[:-2] == [width] * len(lengths[:-2])
        if len(lengths) > 1:
            assert (lengths[-2], lengths[-1]) == (width, lengths[-1]) or (lengths[-2], lengths[-1]) == (width - 1, 2)
        assert all(2 <= length <= width for length in lengths)


@given(RECORDS, st.integers(3, 9))
@settings(deadline=None, max_examples=100)
def test_every_token_of_a_stream_is_supervised_but_the_first_of_each_row(
    records: list[tuple[int, int]], width: int
) -> None:
    table, _ = concatenated(records, width)
    for index in range(len(table)):
        ids, supervised = table.row(index)
        assert supervised.tolist() == [0, *[1] * (len(ids) - 1)]
        assert table.lengths[index] == len(ids) and table.n_supervised[index] == len(ids) - 1 >= 1


@given(RECORDS, st.integers(3, 9))
@settings(deadline=None, max_examples=100)
def test_a_row_tells_the_lines_of_all_records_it_has_tokens_of(records: list[tuple[int, int]], width: int) -> None:
    table, _ = concatenated(records, width)
    line_of = [line for line, (length, _) in enumerate(records, start=1) for _ in range(length)]
    for index in range(len(table)):
        expected = dict.fromkeys(line_of[token] for token in table.row(index)[0])
        assert [line for _, line in table.where(index)] == list(expected)


@given(RECORDS, st.integers(3, 9), st.integers(3, 9))
@settings(deadline=None, max_examples=100)
def test_the_digest_of_streams_changes_with_the_rows_and_with_nothing_else(
    records: list[tuple[int, int]], one: int, other: int
) -> None:
    first, second = concatenated(records, one)[0], concatenated(records, other)[0]
    same = first.lengths.tolist() == second.lengths.tolist()
    assert (first.digest == second.digest) is same


def test_a_stream_is_of_the_chosen_records_in_their_order() -> None:
    store, _, _ = stream([(3, 0), (4, 0), (2, 0), (3, 0)])
    table = ConcatTable(store, np.array([3, 1]), np.array([0, 0]), 5)
    assert [table.row(n)[0].tolist() for n in range(len(table))] == [[9, 10, 11, 3, 4], [5, 6]]


def test_no_records_make_no_rows() -> None:
    none = np.empty(0, dtype=np.int64)
    assert len(ConcatTable(store_of([]), none, none, 4)) == 0
