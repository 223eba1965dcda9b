"""The words and settings that an argument takes, for objects that Python makes: no parser has checked those."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mft_lightning.errors import UserError, nearest


def check_words(group: str, maker: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse a word or number that an argument's annotation does not list, and what is not the settings it names.

    Args:
        group: the key in YAML that the arguments stand under.
        maker: what takes the arguments: a function, or a class whose fields they are.
        given: its arguments, by name; others are passed over.

    Raises:
        UserError: naming the argument as a key.
    """
    for name, hint in get_type_hints(maker).items():
        if name not in given:
            continue
        value = given[name]
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
        kinds = tuple(part for part in parts if isinstance(part, type))
        if isinstance(value, kinds) or value in words:
            continue
        if words and isinstance(value, str | int):
            listed = ", ".join(map(str, words))
            raise UserError(f"{group}.{name}: {value!r} is none of {listed}.{nearest(str(value), map(str, words))}")
        for kind in filter(is_dataclass, kinds):
            raise UserError(f"{group}.{name}: takes {kind.__name__}, not {value!r:.80}.")
