"""Records of other programs' data files to ``chat_rounds``: Alpaca, ShareGPT, OpenAI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mft_lightning.data.records import BadRecord, parse_record
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
_OPENAI_ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "bot"}
# what a record cannot do without, and plain turns do not have
_TOOLS = ("tools", "functions", "tool_calls", "function_call", "tool_call_id")
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
        _refuse(turn, where)
        role = _role(turn.get(keys[0]), _SHAREGPT_ROLES, where, keys[0])
        rounds.append(_round(role, turn.get(keys[1]), f"{where}.{keys[1]}"))
        left_out += [f"conversations[].{name}" for name in turn if name not in keys]
    _refuse(record, "")
    return rounds, ("conversations", "system")


def _openai(record: dict[str, Any], left_out: list[str]) -> tuple[list[Round], tuple[str, ...]]:
    """``messages`` of ``role`` and ``content``, a text or a list of parts that are texts."""
    rounds = []
    _refuse(record, "")
    for i, message in enumerate(_turns(record, "messages")):
        where = f"messages[{i}]"
        _refuse(message, where)
        if message.get("weight", 1) != 1:
            raise BadRecord("weight", f"{where}.weight: is {message['weight']!r}, and every answer is learnt from here")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_part(part, f"{where}.content[{j}]") for j, part in enumerate(content))
        role = _role(message.get("role"), _OPENAI_ROLES, where, "role")
        rounds.append(_round(role, content, f"{where}.content"))
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


def _refuse(given: dict[str, Any], where: str) -> None:
    if found := [name for name in _TOOLS if given.get(name)]:
        place = f"{where}.{found[0]}" if where else found[0]
        raise BadRecord("tools", f"{place}: calls of functions are not learnt from here")


def _role(role: object, known: dict[str, str], where: str, key: str) -> str:
    if not isinstance(role, str) or role not in known:
        raise BadRecord("unknown-role", f"{where}.{key}: {role!r:.60} is none of {', '.join(known)}")
    return known[role]


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise BadRecord("no-text", f"{where}: is {kind!r:.60}; only texts are learnt from")
    return _text(part.get("text"), f"{where}.text")


def _round(role: str, content: object, where: str) -> Round:
    return {"role": role, "content": _text(content, where)}


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        what = "is missing" if value is None else f"is {type(value).__name__}, not a text"
        raise BadRecord("missing-content", f"{where}: {what}")
    return value
