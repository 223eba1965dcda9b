"""Questions: the last whole answer of each conversation, in order, in batches that every layout shares."""

from __future__ import annotations

from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.data.chat_encoder import Encoded
from mft_lightning.data.held_out import NOTHING, Held, Questions, whole_answers
from mft_lightning.data.token_table import RecordTable
from tests.data.tables import store_of

EOS = 0
# a conversation: the lengths of its stretches and of its answers, without eos, in turn
TALKS = st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=3), max_size=20)


def encoded(rounds: list[tuple[int, int]], first: int) -> Encoded:
    ids: list[int] = []
    spans: list[int] = []
    for stretch, answer in rounds:
        ids += range(first + len(ids), first + len(ids) + stretch)
        spans += (len(ids), len(ids) + answer + 1)
        ids += [*range(first + len(ids), first + len(ids) + answer), EOS]
    return Encoded(ids, spans)


def table(talks: list[list[tuple[int, int]]], tasks: list[int], cut: int = 0) -> RecordTable:
    rows = [encoded(rounds, 1 + 1000 * number) for number, rounds in enumerate(talks)]
    lengths = np.array([len(row.input_ids) - cut for row in rows], dtype=np.int32)
    numbers = np.arange(len(rows), dtype=np.int32)
    return RecordTable(store_of(rows), numbers, lengths, np.array(tasks, dtype=np.int32), lengths)


@given(talks=TALKS, batch_size=st.integers(1, 5), world=st.integers(1, 4), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_every_last_answer_is_asked_once_whatever_the_layout(
    talks: list[list[tuple[int, int]]], batch_size: int, world: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    tasks = sorted(draw.integers(0, 3, len(talks)).tolist())
    data = table(talks, tasks)
    in_two = draw.integers(0, 2, len(talks)).astype(bool)
    parts = [("train", data, np.flatnonzero(in_two)), ("test", data, np.flatnonzero(~in_two))]
    questions = Questions(parts, 3, EOS, batch_size)
    assert len(questions) == len(talks) and not questions.left_out.any()
    for number, rounds in enumerate(talks):
        ids = encoded(rounds, 1 + 1000 * number).input_ids
        last = rounds[-1][1] + 1
        assert questions.held(number) == Held(tasks[number], ids[:-last], ids[-last:-1])
        assert questions.splits[number] == ("train" if in_two[number] else "test")
        assert questions.turns[number] == len(rounds) - 1 and questions.where(number)[1] == number + 1
    assert sorted(chain(*questions.batches)) == list(range(len(talks)))
    lengths = [len(held.prompt) for number in range(len(questions.batches)) for held in questions.batch(number)]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(batch) == batch_size for batch in questions.batches[:-1])
    questions.answered = set(range(0, len(questions.batches), 2))
    shares = [questions.share(rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    asked = [number for share in shares for number in share if number != NOTHING]
    assert sorted(asked) == list(range(1, len(questions.batches), 2))
    assert questions.batch(NOTHING) == []


def test_a_truncated_answer_is_not_asked_and_what_holds_no_other_is_left_out() -> None:
    data = table([[(3, 2), (4, 3)], [(2, 2)], [(5, 1), (1, 1), (1, 4)]], [0, 1, 1], cut=1)
    assert list(whole_answers(data, 2, EOS)) == [(5, 7), (8, 10)]
    questions = Questions([("valid", data, np.arange(3))], 2, EOS, 8)
    assert [questions.turns[number] for number in range(len(questions))] == [0, 1]
    assert questions.left_out.tolist() == [0, 1]


def test_other_questions_have_another_digest() -> None:
    talks, tasks = [[(3, 2)], [(4, 2)], [(3, 1)]], [0, 0, 1]
    digests = [
        Questions([("valid", table(data, tasks), np.array(chosen))], 2, EOS, size).digest
        for data, chosen, size in (
            (talks, [0, 1, 2], 2),
            (talks, [0, 1, 2], 3),
            (talks, [0, 2], 2),
            (talks, [1, 2], 2),
            ([[(3, 2)], [(4, 2)], [(3, 2)]], [0, 1, 2], 2),
        )
    ]
    assert len(set(digests)) == len(digests)
    assert digests[0] == Questions([("valid", table(talks, tasks), np.arange(3))], 2, EOS, 2).digest
