"""JSONL lines to conversations: every accepted form, every bad one with its reason and field."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


# --- bad forms


HUMAN = b'{"role": "human", "content": "q"}'
BOT = b'{"role": "bot", "content": "a"}'
SYS = b'{"role": "system", "content": "s"}'


def chat(*items: bytes) -> bytes:
    return b'{"chat_rounds": [' + b", ".join(items) + b"]}"


BAD = {
    "cut off": (b'{"prompt": "q", "answer": ', "invalid-json", "not valid JSON"),
    "single quotes": (b"{'prompt': 'q'}", "invalid-json", "column 2"),
    "two objects in a line": (b'{"text": "a"} {"text": "b"}', "invalid-json", "column 15"),
    "raw control character": (b'{"text": "a\x01"}', "invalid-json", "column"),
    "BOM inside the file": (BOM + b'{"text": "a"}', "invalid-json", "BOM"),
    "nested deeply": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid-json", "nested too deeply"),
    "latin-1": ('{"text": "é"}'.encode("latin-1"), "not-utf8", "byte 10"),
    "utf-16": ('{"text": "a"}'.encode("utf-16"), "not-utf8", "UTF-8"),
    "array": (b'["a"]', "not-an-object", "list"),
    "string": (b'"a"', "not-an-object", "str"),
    "null": (b"null", "not-an-object", "NoneType"),
    "key twice": (b'{"prompt": "q", "answer": "a", "answer": "b"}', "duplicate-key", "answer"),
    "key twice inside": (chat(HUMAN, b'{"role": "bot", "content": "a", "content": "b"}'), "duplicate-key", "content"),
    "no known field": (b'{"question": "q"}', "no-conversation", "chat_rounds"),
    "empty object": (b"{}", "no-conversation", "prompt"),
    "rounds null": (b'{"chat_rounds": null}', "bad-rounds", "chat_rounds"),
    "rounds an object": (b'{"messages": {"role": "human"}}', "bad-rounds", "messages"),
    "a round that is a string": (chat(HUMAN, b'"a"'), "bad-rounds", "chat_rounds[1]"),
    "role unknown": (chat(b'{"role": "gpt", "content": "q"}', BOT), "unknown-role", "chat_rounds[0].role"),
    "role in capitals": (chat(HUMAN, b'{"role": "Bot", "content": "q"}'), "unknown-role", "chat_rounds[1].role"),
    "role missing": (chat(HUMAN, b'{"content": "q"}'), "unknown-role", "chat_rounds[1].role"),
    "role a list": (chat(HUMAN, b'{"role": ["bot"], "content": "q"}'), "unknown-role", "chat_rounds[1].role"),
    "content missing": (chat(HUMAN, b'{"role": "bot"}'), "missing-content", "chat_rounds[1].content"),
    "content null": (chat(b'{"role": "human", "content": null}', BOT), "missing-content", "chat_rounds[0].content"),
    "content a list": (chat(HUMAN, b'{"role": "bot", "content": []}'), "missing-content", "chat_rounds[1].content"),
    "prompt missing": (b'{"answer": "a"}', "missing-content", "prompt: is missing"),
    "answer missing": (b'{"prompt": "q"}', "missing-content", "answer: is missing"),
    "answer null": (b'{"prompt": "q", "answer": null}', "missing-content", "answer: is NoneType"),
    "prompt a number": (b'{"prompt": 1, "answer": "a"}', "missing-content", "prompt: is int"),
    "system a number": (b'{"system": 1, "prompt": "q", "answer": "a"}', "missing-content", "system: is int"),
    "text null": (b'{"text": null}', "missing-content", "text"),
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
    "answer empty": (b'{"prompt": "q", "answer": ""}', "empty-answer", "answer"),
    "no bot turn": (chat(SYS, HUMAN), "no-bot-turn", "chat_rounds"),
    "no round at all": (b'{"messages": []}', "no-bot-turn", "messages"),
}


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
