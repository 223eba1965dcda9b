"""Alpaca, ShareGPT and OpenAI records, in lines and in arrays, to conversations that training reads."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.data.records import BadRecord, parse_record
from mft_lightning.errors import UserError
from mft_lightning.moving_over import json_records
from mft_lightning.moving_over.chat_forms import convert_record, form_of
from mft_lightning.moving_over.json_records import read_records


def turns(record: dict[str, object]) -> list[tuple[str, str]]:
    """What training reads of a record."""
    line = convert_record(record, form_of(record)).line
    assert "\n" not in line
    return [(turn.role, turn.content) for turn in parse_record(line.encode()).turns]


def test_alpaca() -> None:
    assert turns({"instruction": "Add", "input": "1 + 1", "output": "2"}) == [("human", "Add\n1 + 1"), ("bot", "2")]
    assert turns({"instruction": "Add", "input": "", "output": "2"}) == [("human", "Add"), ("bot", "2")]
    assert turns({"instruction": "", "input": "1", "output": "2"}) == [("human", "1"), ("bot", "2")]
    assert turns({"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}) == [
        ("system", "s"),
        ("human", "a"),
        ("bot", "b"),
        ("human", "c"),
        ("bot", "d"),
    ]


def test_sharegpt() -> None:
    conversation = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert turns({"conversations": conversation}) == [("human", "a"), ("bot", "b")]
    assert turns({"conversations": conversation, "system": "s"})[0] == ("system", "s")
    other = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    assert turns({"conversations": other}) == [("system", "s"), ("human", "a"), ("bot", "b")]


def test_openai() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]
    answered = [*messages, {"role": "assistant", "content": "c", "weight": 1}]
    assert turns({"messages": answered}) == [("system", "s"), ("human", "ab"), ("bot", "c")]


QUESTION = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [QUESTION, {"role": "assistant", "content": "b"}], "tools": []},
        {"messages": [QUESTION, {"role": "assistant", "content": "b", "weight": 0}]},
        {"messages": [QUESTION, {"role": "assistant", "content": "b", "weight": None, "tool_calls": None}]},
        {"messages": [QUESTION, {"role": "assistant", "content": "b", "tool_calls": [{"id": "x"}]}]},
        {"messages": [QUESTION, {"role": "assistant", "content": "b"}], "tools": [{"type": "function"}]},
        {"messages": [{"role": "developer", "content": "s"}, QUESTION, {"role": "assistant", "content": "b"}]},
        {"messages": [QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]},
        {"messages": [QUESTION, {"role": "assistant", "content": [{"type": "refusal", "refusal": "b"}]}]},
        {"messages": [QUESTION, {"role": "tool", "content": "b", "tool_call_id": "x"}]},
    ],
)
def test_messages_are_read_directly_as_they_are_converted(record: dict[str, object]) -> None:
    def outcome(read: Callable[[], object]) -> object:
        try:
            return read()
        except BadRecord as error:
            return error.reason, error.detail

    assert outcome(lambda: parse_record(json.dumps(record).encode())) == outcome(
        lambda: parse_record(convert_record(record, form_of(record)).line.encode())
    )


def test_what_is_no_part_of_the_conversation_is_told_and_the_id_is_kept() -> None:
    record = {
        "id": "x",
        "conversations": [{"from": "human", "value": "a", "lang": "en"}, {"from": "gpt", "value": "b"}],
    }
    converted = convert_record({**record, "source": "web"}, "ShareGPT")
    assert converted.left_out == ["source", "conversations[].lang"]
    assert json.loads(converted.line)["id"] == "x"


def test_the_originals_own_forms_are_left_as_they_are() -> None:
    for record in (
        {
            "chat_rounds": [{"role": "human", "content": "a"}, {"role": "bot", "content": "b"}],
            "id": 0,
            "data_name": "x",
        },
        {"prompt": "a", "answer": "b"},
        {"text": "a"},
    ):
        assert json.loads(convert_record(record, form_of(record)).line) == record


@pytest.mark.parametrize(
    ("record", "reason", "why"),
    [
        (
            {"instruction": "a", "output": ""},
            "empty-answer",
            "as chat_rounds, chat_rounds[1]: the bot's answer is empty",
        ),
        ({"instruction": "", "output": "b"}, "empty-instruction", "instruction: is empty, and so is input"),
        ({"instruction": "a"}, "missing-content", "output: is missing"),
        ({"instruction": 3, "output": "b"}, "missing-content", "instruction: is int, not a text"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "bad-history", "history[0]: is no pair"),
        ({"instruction": "a", "output": "\ud800"}, "not-unicode", "lone surrogate"),
        ({"conversations": "a"}, "bad-rounds", "conversations: is str, not a list"),
        ({"conversations": ["a"]}, "bad-rounds", "conversations[0]: is str, not an object"),
        (
            {"conversations": [{"from": "gpt", "value": "b"}]},
            "role-order",
            "is a bot turn where a human turn must stand",
        ),
        (
            {"conversations": [{"from": "tool", "value": "b"}]},
            "unknown-role",
            "conversations[0].from: 'tool' is none of",
        ),
        (
            {"conversations": [], "tools": "[{}]"},
            "tools",
            "tools: calls of functions are no part of a conversation here",
        ),
        (
            {"conversations": [{"from": "human", "value": None}]},
            "missing-content",
            "conversations[0].value: is missing",
        ),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]}, "tools", "messages[0].tool_calls"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "no-text",
            "is 'image_url', and only texts",
        ),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "weight", "messages[0].weight: is 0"),
        ({"conversations": [{"from": "human", "value": "a", "weight": 0}]}, "weight", "conversations[0].weight: is 0"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no-bot-turn", "has no bot turn to learn from"),
        ({"question": "a"}, "unknown-form", "has none of instruction (Alpaca)"),
        ({}, "unknown-form", "but nothing"),
        ({"instruction": "a", "messages": []}, "several-forms", "has instruction and messages, of different forms"),
    ],
)
def test_what_plain_turns_cannot_say_is_a_bad_record(record: dict[str, object], reason: str, why: str) -> None:
    with pytest.raises(BadRecord) as caught:
        convert_record(record, form_of(record))
    assert caught.value.reason == reason and why in caught.value.detail


# ---------------------------------------------------------------- lines and arrays


def read(file: Path) -> list[tuple[int, object]]:
    return [(record.line, json.loads(record.raw)) for record in read_records(file)]


records = st.lists(
    st.dictionaries(st.text(max_size=8), st.text() | st.integers() | st.lists(st.text(), max_size=3), max_size=4),
    max_size=8,
)


@settings(deadline=None, max_examples=60)
@given(records, st.sampled_from([None, 1, 3]), st.booleans(), st.integers(1, 40))
def test_an_array_is_read_as_json_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    found: list[dict[str, object]],
    indent: int | None,
    plain: bool,
    piece: int,
) -> None:
    file = tmp_path_factory.mktemp("array") / "a.json"
    text = json.dumps(found, indent=indent, ensure_ascii=plain)
    file.write_bytes(text.encode("utf-8", "surrogatepass") if plain else json.dumps(found, indent=indent).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "_PIECE", piece)
        assert [record for _, record in read(file)] == found


def test_records_know_their_place(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('\n[\n{"a": 1},\n\n {"a":\n 2}, {"a": 3}\n]\n')
    assert read(file) == [(3, {"a": 1}), (5, {"a": 2}), (6, {"a": 3})]
    assert [record.where for record in read_records(file)][1:] == [f"{file}:5 (record 2)", f"{file}:6 (record 3)"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('\n{"a": 1}\n\n{"a": 2}\n')
    assert read(lines) == [(2, {"a": 1}), (4, {"a": 2})]
    assert [record.where for record in read_records(lines)] == [f"{lines}:2", f"{lines}:4"]


def test_compressed_files_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.json.gz"
    file.write_bytes(gzip.compress(b'\xef\xbb\xbf [{"a": "\xc3\xa9"}]'))
    assert read(file) == [(1, {"a": "é"})]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'[{"a": 1}', ":1 (record 1): the file ends where ',' must stand"),
        (b'[{"a": 1},\n{"b"', ":2 (record 2): ends in the middle of a record."),
        (b'[{"a": 1}\n {"b": 1}]', ":2 (record 1): '{' stands where ',' must stand"),
        (b'[{"a": 1},]', ":1 (record 2): the array is not as it must be: a comma stands before its end."),
        (b"[1]", "the array is not as it must be: it holds something that is no object."),
        (b'[{"a" 1}]', ":1 (record 1): is not valid JSON (Expecting ':' delimiter)."),
        (b'[\n{"a": 1}] x', ":2 (record 1): something follows the array."),
        (b'[{"a": "\xff"}]', "is not UTF-8 from here on."),
        (b"[" + b'{"a":' * 100_000, "nested too deeply"),
        (b'[{"a": "' + b"x" * (18 << 20), "has a record longer than 8 MiB."),
        (b"[", "the array is not as it must be: the file ends in it."),
    ],
)
def test_a_damaged_array_is_told_with_its_line(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_records(tmp_path / "a.json"))
    assert why in str(caught.value) and str(tmp_path / "a.json") in str(caught.value)
