"""What a script's words come to, as far as that is known without running it.

A value that is not known stands in a text as :func:`left_open` writes it: a variable that the script leaves to the
environment, or one that takes what a command says.
"""

from __future__ import annotations

import ast
import fnmatch
import operator
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from mft_lightning.errors import UserError
from mft_lightning.moving_over.shell_syntax import Part, Word, scan_quoted

_OPEN, _CLOSE, _BLANK = "\x01", "\x02", "\x03"  # around the name of what is open, and in it; no script holds them
_LEFT_OPEN = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")
MOST = 1 << 20  # of a variable
_SUMS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: int(a / b),
    ast.Mod: lambda a, b: a - b * int(a / b),
}


def left_open(name: str) -> str:
    """What stands for a value that is not known: the name of a variable, or a command like ``$(date)``."""
    return f"{_OPEN}{_BLANK.join(name.split())}{_CLOSE}"


def open_names(text: str) -> list[str]:
    """The names that a text leaves open."""
    return [name.replace(_BLANK, " ") for name in _LEFT_OPEN.findall(text)]


def as_variables(text: str) -> str:
    """A text with ``${NAME}`` for what it leaves open."""
    return _LEFT_OPEN.sub(lambda match: f"${{{match[1].replace(_BLANK, ' ')}}}", text)


def as_written(text: str) -> str:
    """A text for a message: what is open as a shell would write it."""
    return _LEFT_OPEN.sub(
        lambda match: ("" if match[1].startswith("$(") else "$") + match[1].replace(_BLANK, " "), text
    )


@dataclass
class Variables:
    """The variables of a script, and how its words expand.

    Attributes:
        file: the script's name, for messages.
        positional: what stands after the script's name on its command line: ``$1`` and on.
        environment: variables that are given from outside, which stand for whatever the script would set them to;
            others that the script does not set are open.
        values: what the script has set so far; a list is an array.
        asked: the numbers of positional values that something has asked for.
        defaulted: variables that are open but for the default that the script gives them, like ``${NAME:-word}``.
    """

    file: str
    positional: Sequence[str]
    environment: Mapping[str, str]
    values: dict[str, str | list[str]] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)
    defaulted: dict[str, str] = field(default_factory=dict)
    _lenient: bool = False

    @contextmanager
    def leniently(self) -> Iterator[None]:
        """Take positional values that are not given as empty meanwhile, as tests for them do."""
        self._lenient = True
        try:
            yield
        finally:
            self._lenient = False

    def assign(self, name: str, value: str | list[str]) -> None:
        """Set a variable that is not given. One that takes what a command says is open by its own name.

        Raises:
            UserError: it grows without end.
        """
        if name in self.environment:
            return
        if len(value) > MOST:
            raise UserError(f"{self.file}: {name} becomes longer than {MOST:,} characters. Write the launch out.")
        if isinstance(value, str) and any(found.startswith("$(") for found in open_names(value)):
            value = left_open(name)
        self.values[name] = value

    def fields(self, words: Sequence[Word]) -> list[tuple[str, int]]:
        """The words of a command, expanded and split, each with its line."""
        return [(text, word.line) for word in words for text in self.split(word)]

    def split(self, word: Word) -> list[str]:
        """A word to the words that it comes to: none where all of it is an empty variable without quotes."""
        done: list[str] = []
        now: str | None = None
        for part in word.parts:
            pieces = self.pieces(part, word.line)
            if pieces is None:
                continue
            for i, piece in enumerate(pieces):
                if i and now is not None:  # a piece begins a word
                    done.append(now)
                    now = None
                if part.quoted or part.kind == "text":
                    now = (now or "") + piece
                    continue
                if piece[:1].isspace() and now is not None:
                    done.append(now)
                    now = None
                parts = piece.split()
                if parts:
                    parts[0] = (now or "") + parts[0]
                    *whole, now = parts
                    done += whole
                    if piece[-1:].isspace():
                        done.append(now)
                        now = None
        return done if now is None else [*done, now]

    def joined(self, parts: Sequence[Part], line: int) -> str:
        """Parts to one text, without splitting."""
        return "".join(" ".join(self.pieces(part, line) or []) for part in parts)

    def pieces(self, part: Part, line: int) -> list[str] | None:
        """What a part comes to: one text, or several of ``$@`` and arrays; None where it is nothing at all."""
        if part.kind == "text":
            return [part.text]
        if part.kind == "command":
            return [left_open(f"$({part.text.strip()})")]
        if part.kind == "sum":
            return [self.sum(part.text, line)]
        name, _, index = part.text.partition("[")
        if name == "#" and not part.operator:
            return [str(len(self.positional))]
        if name in ("@", "*") or index[:1] in ("@", "*"):
            values = self.all_positional() if name in ("@", "*") else self.array(name)
            if part.operator == ":":  # from so many on
                start = int(part.argument) if part.argument.isdecimal() else None
                if start is None:
                    raise self.fail(part, line)
                values = values[start - (name in ("@", "*")) :]
            elif part.operator:
                raise self.fail(part, line)
            if part.quoted and "*" in (name, index[:1]):
                values = [" ".join(values)]
            return values or None
        value = self.value(name, int(index[:-1]) if index else None)
        return [self.operated(part, value, line)]

    def value(self, name: str, index: int | None = None) -> str | None:
        """A variable's value; None where nothing sets it."""
        if name.isdecimal() and name != "0":
            place = int(name) - 1
            self.asked.add(place + 1)
            return self.positional[place] if place < len(self.positional) else None
        if name in self.values:
            found = self.values[name]
            if isinstance(found, str):
                return found if not index else ""
            return found[index or 0] if (index or 0) < len(found) else ""
        if name in self.environment and index is not None:
            items = self.array(name)
            return items[index] if index < len(items) else ""
        return self.environment.get(name)

    def all_positional(self) -> list[str]:
        self.asked.update(range(1, len(self.positional) + 1))
        return list(self.positional)

    def array(self, name: str) -> list[str]:
        found = self.values.get(name)
        if found is None and name in self.environment:
            try:
                return shlex.split(self.environment[name])
            except ValueError as error:
                raise UserError(f"--set {name}: is read as words, and has a quote that is not closed.") from error
        if found is None:
            return [left_open(name)]
        return list(found) if isinstance(found, list) else [found]

    def operated(self, part: Part, value: str | None, line: int) -> str:
        """A variable's value after what the braces do with it."""
        name, how = part.text.partition("[")[0], part.operator
        if how in (":-", "-", ":=", "="):
            if value is None or (value == "" and how.startswith(":")):
                unset = value is None and not name.isdecimal()
                value = self.joined(scan_quoted(_unquoted(part.argument), self.file, line), line)
                if unset:
                    self.defaulted[name] = value
                if how.endswith("="):
                    self.values[name] = value
            return value
        if how in (":+", "+"):
            if value is None and not name.isdecimal():
                self.defaulted[name] = "nothing"
            present = value is not None and (value != "" or how == "+")
            return self.joined(scan_quoted(_unquoted(part.argument), self.file, line), line) if present else ""
        if value is None:
            if name == "0":
                value = self.file
            elif name.isdecimal() and not self._lenient:
                raise UserError(
                    f"{self.file}:{line}: ${name} is not given. Give the script's values after it: per-device batch "
                    f"size, tensor parallel, data parallel, epochs, as in: convert-config {self.file} 10 1 8 5"
                )
            elif name.isdecimal():
                value = ""
            else:
                value = left_open(name)
        if not how or how in (":?", "?"):
            return value
        if open_names(value):
            return left_open(f"$({as_written(value)}{how}{part.argument})")
        if how == "length":
            return str(len(value))
        pattern = self.joined(scan_quoted(_unquoted(part.argument), self.file, line), line)
        if how in ("%", "%%", "#", "##"):
            return _without(value, pattern, how)
        if how in ("^^", ",,"):
            return value.upper() if how == "^^" else value.lower()
        if how in ("/", "//") and not re.search(r"[*?\[\\]", pattern):
            old, _, new = pattern.partition("/")
            return value.replace(old, new) if how == "//" else value.replace(old, new, 1)
        raise self.fail(part, line)

    def sum(self, text: str, line: int) -> str:
        """The value of ``$((...))``: whole numbers, ``+ - * / %`` and brackets."""
        written = self.joined(scan_quoted(text, self.file, line), line)
        if open_names(written):
            return left_open(f"$(({as_written(written).strip()}))")
        try:
            return str(self._sum(ast.parse(written.strip(), mode="eval").body))
        except _Open as error:
            return left_open(f"$(({written.strip()})) with {error}")
        except (SyntaxError, ValueError, ZeroDivisionError, KeyError) as error:
            raise UserError(f"{self.file}:{line}: $(({text})) cannot be worked out. Write the number.") from error

    def _sum(self, node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name):
            value = self.value(node.id)
            if value is None or open_names(value):
                raise _Open(node.id)
            return int(value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            operand = self._sum(node.operand)
            return -operand if isinstance(node.op, ast.USub) else operand
        if isinstance(node, ast.BinOp):
            return _SUMS[type(node.op)](self._sum(node.left), self._sum(node.right))
        raise ValueError(type(node).__name__)

    def fail(self, part: Part, line: int) -> UserError:
        return UserError(
            f"{self.file}:{line}: ${{{part.text}{part.operator}{part.argument}}} is more of the shell than "
            "convert-config reads. Write what it comes to."
        )


class _Open(Exception):
    """A sum has a variable that is open."""


def _unquoted(word: str) -> str:
    """A word of ``${NAME:-word}`` without quotes around the whole of it."""
    whole = len(word) > 1 and word[0] == word[-1] and word[0] in "'\"" and word[0] not in word[1:-1]
    return word[1:-1] if whole else word


def _without(value: str, pattern: str, how: str) -> str:
    """A value without the shortest or longest beginning or end that a pattern matches."""
    cuts = range(len(value) + 1)
    if how.startswith("%"):
        ends = [cut for cut in cuts if fnmatch.fnmatchcase(value[cut:], pattern)]
        return value if not ends else value[: min(ends) if how == "%%" else max(ends)]
    starts = [cut for cut in cuts if fnmatch.fnmatchcase(value[:cut], pattern)]
    return value if not starts else value[max(starts) if how == "##" else min(starts) :]
