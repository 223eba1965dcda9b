"""JSONL lines to conversations. Every line is a conversation or a :class:`BadRecord` with its reason and field."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from reprlib import Repr
from typing import Any, Literal, NamedTuple, get_args

from mft_lightning.data.lines import MAX_LINE

Role = Literal["system", "human", "bot"]
ROLES: tuple[Role, ...] = get_args(Role)
ROLE_ALIASES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "human",
    "user": "human",
    "bot": "bot",
    "assistant": "bot",
}
CALLS = ("tools", "functions", "tool_calls", "function_call", "tool_call_id")  # what turns of words do not say
ELSEWHERE = {"instruction": "Alpaca", "conversations": "ShareGPT"}  # forms of other programs, by a field of theirs
ANSWERS = ("response", "completion", "output", "chosen")  # what other programs call an answer
_SHORT = Repr()  # a value of the record in a message: it may be as long as a line
_SHORT.maxstring = 60
_STRANGE = {"\0": "a NUL, as in UTF-16,", "\ufeff": "a BOM (byte order mark)"}  # where JSON would have a value


class Turn(NamedTuple):  # which is made in a third of the time of a dataclass, and one for every turn of every record
    role: Role
    content: str


class Conversation(NamedTuple):
    """Either chat ``turns`` (an optional system turn, then human and bot in alternation) or plain ``text``."""

    turns: tuple[Turn, ...] = ()
    text: str | None = None


@dataclass(frozen=True)
class Question:
    """What is to be answered next, and the answer the record itself gives to it, if it does."""

    turns: tuple[Turn, ...]
    reference: str | None = None


class BadRecord(Exception):
    """A line that is no usable conversation.

    Args:
        reason: a short, stable name to count by (``unknown-role``).
        detail: the sentence a user reads, naming the field.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def parse_record(raw: bytes) -> Conversation:
    """One JSONL line to a conversation to learn from.

    The first of these forms that the object has is read, and its other fields are ignored: ``chat_rounds`` or
    ``messages`` (lists of ``role`` and ``content``), ``prompt`` and ``answer`` (with an optional ``system``), ``text``.

    Raises:
        BadRecord: with the reason and the field.
    """
    record = parse_object(raw)
    turns = _turns(record, answered=True)
    if turns is None:
        text = _text(record, "text")
        if not text:
            raise BadRecord("empty-text", "text: is empty")
        return Conversation(text=text)
    if not any(turn.role == "bot" for turn in turns):
        raise BadRecord("no-bot-turn", f"{_field(record)}: has no bot turn to learn from")
    return Conversation(turns=tuple(turns))


def parse_question(raw: bytes) -> Question:
    """One JSONL line, in any form that training reads, to what is to be answered next.

    A conversation that ends with a human turn asks for the next; one that ends with a bot turn, as those to train on
    do, asks for that turn again. ``answer`` may be left out beside ``prompt``.

    Raises:
        BadRecord: with the reason and the field.
    """
    record = parse_object(raw)
    turns = _turns(record, answered=False)
    if turns is None:
        raise BadRecord("text", "text: is plain text without a turn to answer")
    reference = turns.pop().content if turns and turns[-1].role == "bot" else None
    if not turns or turns[-1].role != "human":
        raise BadRecord("no-question", f"{_field(record)}: has no human turn to answer")
    return Question(tuple(turns), reference)


def _field(record: dict[str, Any]) -> str:
    return next(field for field in ("chat_rounds", "messages", "answer", "prompt") if field in record)


def _turns(record: dict[str, Any], *, answered: bool) -> list[Turn] | None:
    """The turns in order; None for a plain ``text``."""
    for field in ("chat_rounds", "messages"):
        if field in record:
            return _checked_order(turns_of(record, field, learnt=answered), (field + "[{}]").format)
    if "prompt" in record or "answer" in record:
        fields: dict[str, Role] = {"prompt": "human", "answer": "bot"}
        if record.get("system") is not None:
            fields = {"system": "system", **fields}
        if not answered and record.get("answer") is None:
            del fields["answer"]
        elif "answer" not in record and (named := [name for name in ANSWERS if name in record]):
            raise BadRecord("missing-content", f"answer: is missing; {named[0]} is called answer here: rename it")
        turns = [Turn(role, _text(record, field)) for field, role in fields.items()]
        return _checked_order(turns, list(fields).__getitem__)
    if "text" in record:
        return None
    other = next((name for field, name in ELSEWHERE.items() if field in record), None)
    hint = f"; it looks like {other}, which convert-data converts" if other else ""
    raise BadRecord("no-conversation", f"has none of the fields chat_rounds, messages, prompt + answer, text{hint}")


def parse_object(raw: bytes) -> dict[str, Any]:
    """One JSONL line to the object that it is.

    Raises:
        BadRecord: it is none.
    """
    if len(raw) > MAX_LINE:
        raise BadRecord("line-too-long", f"is longer than {MAX_LINE >> 20} MiB")
    hint = (
        "; it looks like a JSON array: write one object per line, as convert-data does" if raw.startswith(b"[") else ""
    )
    try:
        record = _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord("not-utf8", f"is not UTF-8 (byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        what = _STRANGE.get(error.doc[error.pos : error.pos + 1], error.msg.removesuffix(" at"))
        raise BadRecord("invalid-json", f"is not valid JSON ({what} at column {error.colno}){hint}") from error
    except ValueError as error:  # a number with more digits than Python converts
        raise BadRecord("invalid-json", f"is not valid JSON ({error})") from error
    except RecursionError as error:
        raise BadRecord("invalid-json", "is nested too deeply") from error
    if not isinstance(record, dict):
        raise BadRecord("not-an-object", f"is a JSON {type(record).__name__}, not an object{hint}")
    return record


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadRecord("duplicate-key", f"{_SHORT.repr(twice)}: stands twice in one object")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)  # json.loads would make one for every line


def _text(record: dict[str, Any], field: str, where: str = "") -> str:
    value = record.get(field)
    if not isinstance(value, str):
        what = "is missing" if field not in record else f"is {type(value).__name__}, not a string"
        raise BadRecord("missing-content", f"{where}{field}: {what}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord("not-unicode", f"{where}{field}: holds a lone surrogate (character {error.start})") from error
    return value


def turns_of(record: dict[str, Any], field: str, *, learnt: bool = True) -> list[Turn]:
    """The turns of ``chat_rounds`` or ``messages``, in whatever order.

    Args:
        record: that has them.
        field: their name.
        learnt: whether they are to be learnt from, which a ``weight`` may forbid.

    Raises:
        BadRecord: what they are cannot be said by turns of words.
    """
    rounds = record[field]
    refuse_calls(record)
    if not isinstance(rounds, list):
        raise BadRecord("bad-rounds", f"{field}: is {type(rounds).__name__}, not a list")
    turns = []
    for i, item in enumerate(rounds):
        try:
            turns.append(_turn(item, learnt))
        except BadRecord as error:
            raise BadRecord(error.reason, f"{field}[{i}]{error.detail}") from error
    return turns


def _turn(item: Any, learnt: bool) -> Turn:
    """A turn of ``chat_rounds`` or ``messages``; an error's detail goes on behind the turn's place."""
    if not isinstance(item, dict):
        raise BadRecord("bad-rounds", f": is {type(item).__name__}, not an object")
    role = ROLE_ALIASES.get(item["role"]) if isinstance(item.get("role"), str) else None
    if role is None:
        known = ", ".join(ROLE_ALIASES)
        raise BadRecord("unknown-role", f".role: {_SHORT.repr(item.get('role'))} is none of {known}")
    refuse_calls(item, ".")
    if learnt:
        refuse_weight(item, ".")
    return Turn(role, _content(item))


def refuse_calls(given: dict[str, Any], where: str = "") -> None:
    """Refuse a record or a turn that has calls of functions.

    Args:
        given: the record or turn.
        where: what stands before its fields' names in messages.

    Raises:
        BadRecord: it has.
    """
    if given.keys().isdisjoint(CALLS):  # as nearly all are, each turn of each record
        return
    if found := [name for name in CALLS if given.get(name)]:
        raise BadRecord("tools", f"{where}{found[0]}: calls of functions are no part of a conversation here")


def refuse_weight(turn: dict[str, Any], where: str) -> None:
    """Refuse a turn that is to be learnt from less than others, or not at all.

    Args:
        turn: whose ``weight`` may say so.
        where: what stands before its fields' names in messages.

    Raises:
        BadRecord: it does.
    """
    if (weight := turn.get("weight")) not in (None, 1):
        raise BadRecord("weight", f"{where}weight: is {_SHORT.repr(weight)}, and every answer is learnt from here")


def _content(item: dict[str, Any]) -> str:
    """What a turn says: a text, or a list of parts that are texts, one after the other."""
    content = item.get("content")
    if not isinstance(content, list):
        return _text(item, "content", ".")
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadRecord("no-text", f".content[{i}]: is {_SHORT.repr(kind)}, and only texts are read")
    return "".join(_text(part, "text", f".content[{i}].") for i, part in enumerate(content))


def _checked_order(turns: list[Turn], place: Callable[[int], str]) -> list[Turn]:
    """A system turn only in front; then human and bot in alternation, human first; an answer in every bot turn.

    Args:
        turns: in order.
        place: of a turn in the record, by its number.
    """
    start = 1 if turns and turns[0].role == "system" else 0
    for i, turn in enumerate(turns[start:]):
        expected = "human" if i % 2 == 0 else "bot"
        if turn.role != expected:
            what = f"is a {turn.role} turn where a {expected} turn must stand"
            raise BadRecord("role-order", f"{place(start + i)}: {what}")
        if turn.role == "bot" and not turn.content:
            raise BadRecord("empty-answer", f"{place(start + i)}: the bot's answer is empty")
    return turns
