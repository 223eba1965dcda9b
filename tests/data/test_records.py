"""JSONL lines to conversations: every accepted form, every bad one with its reason and field."""

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.data.lines import MAX_LINE
from mft_lightning.data.records import BadRecord, Conversation, Question, Turn, parse_question, parse_record

SYSTEM, ASK, REPLY = Turn("system", "Be brief."), Turn("human", "2+2?"), Turn("bot", "4")
FORMS = ["chat_rounds", "messages"]
BOM = b"\xef\xbb\xbf"


def parsed(record: Any) -> Conversation:
    return parse_record(json.dumps(record).encode())


def refusal(raw: bytes) -> BadRecord:
    with pytest.raises(BadRecord) as caught:
        parse_record(raw)
    assert str(caught.value) == caught.value.detail
    return caught.value


def rounds(*turns: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


# --- accepted forms


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("human", "bot"), [("human", "bot"), ("user", "assistant"), ("user", "bot")])
def test_rounds_are_read_with_either_name_of_each_role(form: str, human: str, bot: str) -> None:
    record = {form: rounds(("system", "Be brief."), (human, "2+2?"), (bot, "4"), (human, "2+2?"), (bot, "4"))}
    assert parsed(record) == Conversation((SYSTEM, ASK, REPLY, ASK, REPLY))


@pytest.mark.parametrize("form", FORMS)
def test_rounds_may_lack_a_system_turn_and_may_end_with_a_question(form: str) -> None:
    assert parsed({form: rounds(("human", "2+2?"), ("bot", "4"), ("human", "2+2?"))}).turns == (ASK, REPLY, ASK)


def test_prompt_and_answer_become_two_turns() -> None:
    assert parsed({"prompt": "2+2?", "answer": "4"}) == Conversation((ASK, REPLY))


def test_prompt_and_answer_take_a_system_turn() -> None:
    assert parsed({"answer": "4", "prompt": "2+2?", "system": "Be brief."}).turns == (SYSTEM, ASK, REPLY)


def test_system_null_is_no_system_turn() -> None:
    assert parsed({"system": None, "prompt": "2+2?", "answer": "4"}).turns == (ASK, REPLY)


def test_text_is_kept_as_text() -> None:
    assert parsed({"text": " def f():\n\treturn 1 "}) == Conversation(text=" def f():\n\treturn 1 ")


def test_other_fields_are_ignored() -> None:
    record = {"id": 7, "data_name": "math", "meta": {"a": [1, None]}, "prompt": "2+2?", "answer": "4", "text": 3}
    assert parsed(record).turns == (ASK, REPLY)


def test_a_system_or_human_content_may_be_empty() -> None:
    assert parsed({"system": "", "prompt": "", "answer": "4"}).turns == (Turn("system", ""), Turn("human", ""), REPLY)


@given(
    questions=st.lists(st.tuples(st.text(), st.text(min_size=1)), min_size=1, max_size=4),
    system=st.none() | st.text(),
    form=st.sampled_from(FORMS),
    ascii_only=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_any_text_comes_back_unchanged(
    questions: list[tuple[str, str]], system: str | None, form: str, ascii_only: bool
) -> None:
    turns = [("human" if i % 2 == 0 else "bot", text) for i, text in enumerate(t for pair in questions for t in pair)]
    if system is not None:
        turns.insert(0, ("system", system))
    raw = json.dumps({form: rounds(*turns)}, ensure_ascii=ascii_only).encode()
    assert [(turn.role, turn.content) for turn in parse_record(raw).turns] == turns


@pytest.mark.parametrize("form", FORMS)
def test_a_content_may_be_parts_that_are_texts_and_a_system_turn_the_developers(form: str) -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    answer = {"role": "assistant", "content": "4", "weight": 1, "tool_calls": None, "name": "x"}
    turns = [*rounds(("developer", "Be brief."), ("user", parts)), answer]
    assert parsed({form: turns, "tools": []}).turns == (SYSTEM, ASK, REPLY)


def test_a_question_may_follow_answers_that_are_not_learnt_from() -> None:
    first = [{"role": "human", "content": "2+2?"}, {"role": "bot", "content": "4", "weight": 0}]
    assert asked({"messages": [*first, {"role": "human", "content": "2+2?"}]}).turns == (ASK, REPLY, ASK)


# --- bad forms


HUMAN = b'{"role": "human", "content": "q"}'
BOT = b'{"role": "bot", "content": "a"}'
SYS = b'{"role": "system", "content": "s"}'


def chat(*items: bytes) -> bytes:
    return b'{"chat_rounds": [' + b", ".join(items) + b"]}"


BAD = {
    "cut off": (b'{"prompt": "q", "answer": ', "invalid-json", "not valid JSON"),
    "cut off in a string": (
        b'{"prompt": "q", "answer": "a',
        "invalid-json",
        "(Unterminated string starting at column 27)",
    ),
    "single quotes": (b"{'prompt': 'q'}", "invalid-json", "column 2"),
    "two objects in a line": (b'{"text": "a"} {"text": "b"}', "invalid-json", "column 15"),
    "raw control character": (b'{"text": "a\x01"}', "invalid-json", "(Invalid control character at column 12)"),
    "BOM inside the file": (BOM + b'{"text": "a"}', "invalid-json", "BOM"),
    "nested deeply": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid-json", "nested too deeply"),
    "latin-1": ('{"text": "é"}'.encode("latin-1"), "not-utf8", "byte 10"),
    "utf-16 without its mark": (
        '{"text": "a"}'.encode("utf-16-le"),
        "invalid-json",
        "a NUL, as in UTF-16, at column 2",
    ),
    "a NUL in a string": ('{"text": "éé\0"}'.encode(), "invalid-json", "a NUL, as in UTF-16, at column 13"),
    "a NUL alone": (b"\0\0", "invalid-json", "column 1"),
    "surrogates in UTF-8": (b'{"text": "\xed\xa0\xbd"}', "not-utf8", "byte 10"),
    "longer than may be": (b'{"text": "' + b"x" * MAX_LINE + b'"}', "line-too-long", "8 MiB"),
    "utf-16": ('{"text": "a"}'.encode("utf-16"), "not-utf8", "UTF-8"),
    "array": (
        b'["a"]',
        "not-an-object",
        "list, not an object; it looks like a JSON array: write one object per line, as convert-data does",
    ),
    "array of conversations": (b'[{"prompt": "q", "answer": "a"}]', "not-an-object", "write one object per line"),
    "array that goes on": (b'[{"prompt": "q", "answer": "a"},', "invalid-json", "write one object per line"),
    "array that starts": (b"[", "invalid-json", "write one object per line"),
    "number": (b"1", "not-an-object", "int"),
    "true": (b"true", "not-an-object", "bool"),
    "NaN": (b"NaN", "not-an-object", "float"),
    "string": (b'"a"', "not-an-object", "str"),
    "null": (b"null", "not-an-object", "NoneType"),
    "key twice": (b'{"prompt": "q", "answer": "a", "answer": "b"}', "duplicate-key", "answer"),
    "key twice inside": (chat(HUMAN, b'{"role": "bot", "content": "a", "content": "b"}'), "duplicate-key", "content"),
    "no known field": (b'{"question": "q"}', "no-conversation", "chat_rounds"),
    "empty object": (b"{}", "no-conversation", "prompt"),
    "a round that is a string": (chat(HUMAN, b'"a"'), "bad-rounds", "chat_rounds[1]"),
    "role unknown": (chat(b'{"role": "gpt", "content": "q"}', BOT), "unknown-role", "chat_rounds[0].role"),
    "role in capitals": (chat(HUMAN, b'{"role": "Bot", "content": "q"}'), "unknown-role", "chat_rounds[1].role"),
    "role missing": (chat(HUMAN, b'{"content": "q"}'), "unknown-role", "chat_rounds[1].role"),
    "role null": (chat(HUMAN, b'{"role": null, "content": "q"}'), "unknown-role", "chat_rounds[1].role: None"),
    "role a number": (chat(HUMAN, b'{"role": 1, "content": "q"}'), "unknown-role", "chat_rounds[1].role: 1"),
    "role an object": (chat(HUMAN, b'{"role": {}, "content": "q"}'), "unknown-role", "chat_rounds[1].role: {}"),
    "role a list": (chat(HUMAN, b'{"role": ["bot"], "content": "q"}'), "unknown-role", "chat_rounds[1].role"),
    "content missing": (chat(HUMAN, b'{"role": "bot"}'), "missing-content", "chat_rounds[1].content"),
    **{
        f"{field} {name}": (record.replace(b"?", value), "missing-content", f"{field}: is {kind}, not a string")
        for name, value, kind in [
            ("null", b"null", "NoneType"),
            ("a number", b"1", "int"),
            ("NaN", b"NaN", "float"),
            ("true", b"true", "bool"),
            ("an object", b'{"a": "b"}', "dict"),
        ]
        for field, record in {
            "chat_rounds[0].content": chat(b'{"role": "human", "content": ?}', BOT),
            "chat_rounds[1].content": chat(HUMAN, b'{"role": "bot", "content": ?}'),
            "prompt": b'{"prompt": ?, "answer": "a"}',
            "answer": b'{"prompt": "q", "answer": ?}',
            "system": b'{"system": ?, "prompt": "q", "answer": "a"}',
            "text": b'{"text": ?}',
        }.items()
        if (field, name) != ("system", "null")  # which is no system turn
    },
    **{
        f"{field} {name}": (b'{"%s": %s}' % (field.encode(), value), "bad-rounds", f"{field}: is {kind}, not a list")
        for field in FORMS
        for name, value, kind in [
            ("null", b"null", "NoneType"),
            ("a number", b"1", "int"),
            ("a string", b'"a"', "str"),
            ("an object", b"{}", "dict"),
        ]
    },
    "parts that are none": (chat(HUMAN, b'{"role": "bot", "content": ["a"]}'), "no-text", "content[0]: is 'str'"),
    "a part without a text": (
        chat(HUMAN, b'{"role": "bot", "content": [{"type": "text"}]}'),
        "missing-content",
        "chat_rounds[1].content[0].text: is missing",
    ),
    "no parts": (chat(HUMAN, b'{"role": "bot", "content": []}'), "empty-answer", "chat_rounds[1]"),
    "prompt a list": (b'{"prompt": ["a"], "answer": "a"}', "missing-content", "prompt: is list, not a string"),
    "a weight": (chat(HUMAN, b'{"role": "bot", "content": "a", "weight": 0.5}'), "weight", "[1].weight: is 0.5, and"),
    "a call": (
        chat(HUMAN, b'{"role": "bot", "content": "a", "function_call": {"name": "f"}}'),
        "tools",
        "chat_rounds[1].function_call: calls of functions are no part of a conversation here",
    ),
    "tools": (b'{"messages": [], "tools": [{}]}', "tools", "tools: calls of functions"),
    "a round that is null": (chat(HUMAN, b"null"), "bad-rounds", "chat_rounds[1]: is NoneType"),
    "a round that is a list": (chat(b'["human", "q"]', BOT), "bad-rounds", "chat_rounds[0]: is list"),
    "prompt missing": (b'{"answer": "a"}', "missing-content", "prompt: is missing"),
    "answer by another name": (
        b'{"prompt": "q", "response": "a"}',
        "missing-content",
        "answer: is missing; response is called answer here: rename it",
    ),
    "answer missing": (b'{"prompt": "q"}', "missing-content", "answer: is missing"),
    "text empty": (b'{"text": ""}', "empty-text", "text"),
    "lone surrogate": (chat(HUMAN, b'{"role": "bot", "content": "a\\ud83d"}'), "not-unicode", "chat_rounds[1].content"),
    "lone surrogate in text": (b'{"text": "\\udc00"}', "not-unicode", "text"),
    "two humans in a row": (chat(HUMAN, HUMAN, BOT), "role-order", "chat_rounds[1]"),
    "two bots in a row": (chat(HUMAN, BOT, BOT), "role-order", "chat_rounds[2]"),
    "bot first": (chat(BOT, HUMAN), "role-order", "chat_rounds[0]"),
    "bot after system": (chat(SYS, BOT), "role-order", "chat_rounds[1]"),
    "system in the middle": (chat(HUMAN, SYS, BOT), "role-order", "chat_rounds[1]"),
    "two systems": (chat(SYS, SYS, HUMAN, BOT), "role-order", "chat_rounds[1]"),
    "bot content empty": (
        chat(HUMAN, b'{"role": "bot", "content": ""}'),
        "empty-answer",
        "chat_rounds[1]",
    ),
    "later answer empty": (
        chat(HUMAN, BOT, HUMAN, b'{"role": "assistant", "content": ""}'),
        "empty-answer",
        "chat_rounds[3]",
    ),
    "bot empty after a system turn": (
        chat(b'{"role": "system", "content": "s"}', HUMAN, b'{"role": "bot", "content": ""}'),
        "empty-answer",
        "chat_rounds[2]: the bot's",
    ),
    "answer empty": (b'{"prompt": "q", "answer": ""}', "empty-answer", "answer"),
    "no bot turn": (chat(SYS, HUMAN), "no-bot-turn", "chat_rounds"),
    "no round at all": (b'{"messages": []}', "no-bot-turn", "messages"),
}


LONG = b"x" * 1_000_000
NEVER_LONG = {
    "role": chat(b'{"role": "%s", "content": "q"}' % LONG),
    "role in a list": chat(b'{"role": ["%s"], "content": "q"}' % LONG),
    "role nested": chat(b'{"role": ' + b"[" * 500 + b"]" * 500 + b', "content": "q"}'),
    "key": b'{"%s": 1, "%s": 2}' % (LONG, LONG),
}


@pytest.mark.parametrize("raw", NEVER_LONG.values(), ids=NEVER_LONG.keys())
def test_a_detail_is_short_however_long_the_value(raw: bytes) -> None:
    assert len(refusal(raw).detail) < 200


def test_a_key_that_stands_twice_among_many_is_found_at_once() -> None:
    keys = ", ".join(f'"{i}": 1' for i in range(300_000))
    start = time.perf_counter()
    assert refusal(f'{{{keys}, "299999": 1}}'.encode()).detail.startswith("'299999'")
    assert time.perf_counter() - start < 10  # to count every key took minutes


@pytest.mark.parametrize("parse", [parse_record, parse_question])
def test_a_line_of_the_greatest_length_is_read(parse: Callable[[bytes], object]) -> None:
    raw = b'{"prompt": "q", "answer": "a"}'.ljust(MAX_LINE)
    assert parse(raw)
    with pytest.raises(BadRecord, match="is longer than 8 MiB"):
        parse(raw + b" ")


KEPT = {
    "white space alone": " \n\t",
    "a NUL": "\0",
    "line separators": "a\u2028b\u2029c\u0085d\x0b\x0c",
    "control tokens": "<|endoftext|><|padding|><|role_start|>bot<|role_end|>",
    "a byte order mark": "\ufeffa",
    "beyond the basic plane": "\U0001f600",
}


@pytest.mark.parametrize("text", KEPT.values(), ids=KEPT.keys())
@pytest.mark.parametrize("ascii_only", [True, False])
def test_text_is_text(text: str, ascii_only: bool) -> None:
    raw = json.dumps({"prompt": text, "answer": text}, ensure_ascii=ascii_only).encode()
    assert parse_record(raw).turns == (Turn("human", text), Turn("bot", text))


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity", b"1" * 4000, b"1e999", b"-0.0"])
def test_numbers_that_nothing_reads_are_ignored(value: bytes) -> None:
    assert parse_record(b'{"id": %s, "prompt": "2+2?", "answer": "4"}' % value).turns == (ASK, REPLY)


@pytest.mark.parametrize(("raw", "reason", "names"), BAD.values(), ids=BAD.keys())
def test_a_bad_record_has_its_reason_and_names_the_field(raw: bytes, reason: str, names: str) -> None:
    refused = refusal(raw)
    assert refused.reason == reason
    assert names in refused.detail


def test_the_detail_names_messages_where_the_record_says_messages() -> None:
    assert refusal(b'{"messages": [{"role": "user", "content": 3}]}').detail.startswith("messages[0].content")


def test_a_number_too_long_for_python_is_a_bad_record_not_a_crash() -> None:
    assert refusal(b'{"prompt": "q", "answer": "a", "id": ' + b"1" * 5000 + b"}").reason == "invalid-json"


def test_a_detail_can_be_printed_even_where_the_key_is_no_unicode() -> None:
    assert refusal(b'{"\\ud800": 1, "\\ud800": 2}').detail.encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["human", "bot", "system"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["chat_rounds", "messages", "role", "content", "prompt", "answer", "system", "text"]), inner
        )
    ),
    max_leaves=12,
)


@given(raw=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(deadline=None, max_examples=150)
def test_whatever_the_line_it_is_a_conversation_or_a_bad_record(raw: bytes) -> None:
    try:
        conversation = parse_record(raw)
    except BadRecord as error:
        assert error.reason and error.detail
    else:
        assert conversation.text or any(turn.role == "bot" and turn.content for turn in conversation.turns)


# --- questions


def asked(record: Any) -> Question:
    return parse_question(json.dumps(record).encode())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("human", "bot"), [("human", "bot"), ("user", "assistant")])
@pytest.mark.parametrize("system", [[], [("system", "Be brief.")]], ids=["no system", "system"])
def test_rounds_that_end_with_a_human_turn_ask_for_the_next(
    form: str, human: str, bot: str, system: list[tuple[str, str]]
) -> None:
    first = (SYSTEM,) if system else ()
    assert asked({form: rounds(*system, (human, "2+2?"))}) == Question((*first, ASK), None)
    longer = rounds(*system, (human, "2+2?"), (bot, "4"), (human, "2+2?"))
    assert asked({form: longer}) == Question((*first, ASK, REPLY, ASK), None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("human", "bot"), [("human", "bot"), ("user", "assistant")])
@pytest.mark.parametrize("system", [[], [("system", "Be brief.")]], ids=["no system", "system"])
def test_rounds_that_end_with_a_bot_turn_ask_for_it_again(
    form: str, human: str, bot: str, system: list[tuple[str, str]]
) -> None:
    first = (SYSTEM,) if system else ()
    assert asked({form: rounds(*system, (human, "2+2?"), (bot, "4"))}) == Question((*first, ASK), "4")
    longer = rounds(*system, (human, "2+2?"), (bot, "5"), (human, "2+2?"), (bot, "4"))
    assert asked({form: longer}) == Question((*first, ASK, Turn("bot", "5"), ASK), "4")


@pytest.mark.parametrize(
    ("fields", "question"),
    [
        ({}, Question((ASK,))),
        ({"answer": None}, Question((ASK,))),
        ({"answer": "4"}, Question((ASK,), "4")),
        ({"system": "Be brief."}, Question((SYSTEM, ASK))),
        ({"system": "Be brief.", "answer": "4"}, Question((SYSTEM, ASK), "4")),
        ({"system": None, "answer": "4", "text": "t"}, Question((ASK,), "4")),
    ],
    ids=str,
)
def test_a_prompt_is_asked_with_or_without_its_answer(fields: dict[str, Any], question: Question) -> None:
    assert asked({"prompt": "2+2?", **fields}) == question


def test_rounds_come_before_a_prompt_beside_them() -> None:
    assert asked({"prompt": "x", "answer": "y", "messages": rounds(("user", "2+2?"))}) == Question((ASK,))


BAD_QUESTION = {
    "plain text": (b'{"text": "def f(): pass"}', "text", "text: "),
    "system alone": (chat(SYS), "no-question", "chat_rounds: "),
    "no round at all": (b'{"messages": []}', "no-question", "messages: "),
    "two humans in a row": (chat(HUMAN, HUMAN), "role-order", "chat_rounds[1]: "),
    "two bots in a row": (chat(HUMAN, BOT, BOT), "role-order", "chat_rounds[2]: "),
    "bot first": (chat(BOT, HUMAN), "role-order", "chat_rounds[0]: "),
    "bot alone": (chat(BOT), "role-order", "chat_rounds[0]: "),
    "bot after system": (chat(SYS, BOT), "role-order", "chat_rounds[1]: "),
    "system in the middle": (chat(HUMAN, BOT, SYS), "role-order", "chat_rounds[2]: "),
    "last answer empty": (chat(HUMAN, b'{"role": "bot", "content": ""}'), "empty-answer", "chat_rounds[1]: "),
    "earlier answer empty": (
        chat(HUMAN, b'{"role": "bot", "content": ""}', HUMAN),
        "empty-answer",
        "chat_rounds[1]: ",
    ),
    "answer empty": (b'{"prompt": "q", "answer": ""}', "empty-answer", "answer: "),
    "answer a number": (b'{"prompt": "q", "answer": 4}', "missing-content", "answer: is int"),
    "answer without its prompt": (b'{"answer": "a"}', "missing-content", "prompt: is missing"),
    "prompt null": (b'{"prompt": null}', "missing-content", "prompt: is NoneType"),
    "system a number": (b'{"system": 1, "prompt": "q"}', "missing-content", "system: is int"),
    "content missing": (chat(b'{"role": "human"}'), "missing-content", "chat_rounds[0].content: is missing"),
    "content null": (chat(b'{"role": "human", "content": null}'), "missing-content", "chat_rounds[0].content: "),
    "role unknown": (chat(b'{"role": "gpt", "content": "q"}'), "unknown-role", "chat_rounds[0].role: "),
    "rounds an object": (b'{"messages": {}}', "bad-rounds", "messages: "),
    "no known field": (b'{"question": "q"}', "no-conversation", "prompt"),
    "lone surrogate": (b'{"prompt": "\\ud83d"}', "not-unicode", "prompt: "),
    "cut off": (b'{"prompt": ', "invalid-json", "column"),
    "array of questions": (b'[{"prompt": "q"}]', "not-an-object", "write one object per line"),
    "key twice": (b'{"prompt": "q", "prompt": "r"}', "duplicate-key", "prompt"),
}


@pytest.mark.parametrize(("raw", "reason", "names"), BAD_QUESTION.values(), ids=BAD_QUESTION.keys())
def test_what_cannot_be_asked_has_its_reason_and_names_the_field(raw: bytes, reason: str, names: str) -> None:
    with pytest.raises(BadRecord) as caught:
        parse_question(raw)
    assert caught.value.reason == reason
    assert names in caught.value.detail


@given(raw=JSON.map(lambda value: json.dumps(value).encode()))
@settings(deadline=None, max_examples=100)
def test_whatever_can_be_learned_can_be_asked(raw: bytes) -> None:
    try:
        question = parse_question(raw)
    except BadRecord as error:
        assert error.reason and error.detail
        with contextlib.suppress(BadRecord):
            assert parse_record(raw).text is not None
        return
    assert question.turns[-1].role == "human"
    if question.reference is not None:
        assert parse_record(raw).turns == (*question.turns, Turn("bot", question.reference))
