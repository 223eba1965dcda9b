"""Records of other programs' data files to ``chat_rounds``: Alpaca, ShareGPT, OpenAI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mft_lightning.data.records import BadRecord, parse_record, refuse_calls, refuse_weight, turns_of
from mft_lightning.screen import json_line

ALPACA, SHAREGPT, OPENAI, OWN = "Alpaca", "ShareGPT", "OpenAI messages", "as it is"
_FORMS = {  # by the field that only it has
    "instruction": ALPACA,
    "conversations": SHAREGPT,
    "messages": OPENAI,
    "chat_rounds": OWN,
    "answer": OWN,
}
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "human",
    "user": "human",
    "gpt": "bot",
    "chatgpt": "bot",
    "assistant": "bot",
    "bot": "bot",
}
Round = dict[str, str]


@dataclass
class Converted:
    """A record as a line of a task's file.

    Attributes:
        line: JSON, without its end.
        left_out: fields of the record that are not in it.
    """

    line: str
    left_out: list[str] = field(default_factory=list)


def form_of(record: dict[str, Any]) -> str:
    """Which form a record has.

    Raises:
        BadRecord: none that is known, or several.
    """
    found = {name: form for name, form in _FORMS.items() if name in record}
    if len(set(found.values())) > 1:
        raise BadRecord("several-forms", f"has {' and '.join(found)}, of different forms. Take one of them out.")
    if found:
        return next(iter(found.values()))
    if "text" in record:
        return OWN
    fields = ", ".join(map(repr, list(record)[:6])) or "nothing"
    raise BadRecord(
        "unknown-form",
        f"has none of instruction (Alpaca), conversations (ShareGPT), messages (OpenAI), chat_rounds, but {fields}",
    )


def convert_record(record: dict[str, Any], form: str) -> Converted:
    """A record of a form as a line that training reads.

    Args:
        record: of one conversation.
        form: of :func:`form_of`.

    Raises:
        BadRecord: it is no usable conversation, or says what plain turns cannot.
    """
    if form == OWN:
        converted = Converted(json_line(record))
    else:
        rounds, used = _CONVERTERS[form](record, left_out := list[str]())
        converted = Converted(
            json_line({"id": record["id"], "chat_rounds": rounds} if "id" in record else {"chat_rounds": rounds}),
            [*(name for name in record if name not in (*used, "id")), *left_out],
        )
    try:
        parse_record(converted.line.encode("utf-8", "surrogatepass"))
    except BadRecord as error:
        if form == OWN:
            raise
        raise BadRecord(error.reason, f"as chat_rounds, {error.detail}") from error
    return converted


def _alpaca(record: dict[str, Any], left_out: list[str]) -> tuple[list[Round], tuple[str, ...]]:
    """``instruction``, ``input`` below it if there is one, ``output``; ``system`` and ``history`` if there are such."""
    rounds = _system(record)
    for i, pair in enumerate(record.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRecord("bad-history", f"history[{i}]: is no pair of an instruction and an output")
        for role, content in zip(("human", "bot"), pair, strict=True):
            rounds.append(_round(role, content, f"history[{i}]"))
    asked = [_text(record.get(name), name) for name in ("instruction", "input") if record.get(name) is not None]
    question = "\n".join(part for part in asked if part)
    if not question:
        raise BadRecord("empty-instruction", "instruction: is empty, and so is input")
    rounds += [{"role": "human", "content": question}, _round("bot", record.get("output"), "output")]
    return rounds, ("instruction", "input", "output", "system", "history")


def _sharegpt(record: dict[str, Any], left_out: list[str]) -> tuple[list[Round], tuple[str, ...]]:
    """``conversations`` of ``from`` and ``value``, or of ``role`` and ``content``; a ``system`` beside them."""
    rounds = _system(record)
    for i, turn in enumerate(_turns(record, "conversations")):
        where = f"conversations[{i}]"
        keys = ("from", "value") if "from" in turn else ("role", "content")
        refuse_calls(turn, f"{where}.")
        refuse_weight(turn, f"{where}.")
        role = _role(turn.get(keys[0]), where, keys[0])
        rounds.append(_round(role, turn.get(keys[1]), f"{where}.{keys[1]}"))
        left_out += [f"conversations[].{name}" for name in turn if name not in (*keys, "weight")]
    refuse_calls(record)
    return rounds, ("conversations", "system")


def _openai(record: dict[str, Any], left_out: list[str]) -> tuple[list[Round], tuple[str, ...]]:
    """``messages``, which training reads as they are, with the names of ``chat_rounds``."""
    rounds = [{"role": str(turn.role), "content": turn.content} for turn in turns_of(record, "messages")]
    for message in record["messages"]:
        left_out += [f"messages[].{name}" for name in message if name not in ("role", "content", "weight")]
    return rounds, ("messages",)


_CONVERTERS: dict[str, Callable[[dict[str, Any], list[str]], tuple[list[Round], tuple[str, ...]]]] = {
    ALPACA: _alpaca,
    SHAREGPT: _sharegpt,
    OPENAI: _openai,
}


def _system(record: dict[str, Any]) -> list[Round]:
    system = record.get("system")
    return [_round("system", system, "system")] if system not in (None, "") else []


def _turns(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    turns = record[name]
    if not isinstance(turns, list):
        raise BadRecord("bad-rounds", f"{name}: is {type(turns).__name__}, not a list")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRecord("bad-rounds", f"{name}[{i}]: is {type(turn).__name__}, not an object")
    return turns


def _role(role: object, where: str, key: str) -> str:
    if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
        raise BadRecord("unknown-role", f"{where}.{key}: {role!r:.60} is none of {', '.join(_SHAREGPT_ROLES)}")
    return _SHAREGPT_ROLES[role]


def _round(role: str, content: object, where: str) -> Round:
    return {"role": role, "content": _text(content, where)}


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        what = "is missing" if value is None else f"is {type(value).__name__}, not a text"
        raise BadRecord("missing-content", f"{where}: {what}")
    return value
