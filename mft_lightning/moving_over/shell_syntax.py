"""A shell script to words and operators. Nothing of it is run.

As much of the shell's grammar as launch scripts have: quotes, continued lines, comments, ``$NAME``, ``${NAME:-word}``,
``$((...))``, ``$(...)``, arrays, redirections, here-documents.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mft_lightning.errors import UserError

_OPERATOR = re.compile(r"\d*(?:<<<|<<-?|&>>|>>|>&|<&|>\||<>|[<>])|&>>?|;;|&&|\|\||\|&|[;&|()\n]")
_ARRAY = re.compile(r"[A-Za-z_]\w*\+?=")
_BRACED = re.compile(
    r"(?P<length>#?)(?P<name>[A-Za-z_]\w*|\d+|[@*#?$!-])(?P<index>\[[@*\d]+\])?(?P<rest>.*)", re.DOTALL
)
_SETS = re.compile(r"\+\+|--|(?<![=!<>])=(?!=)")  # within ((...))
_OPENED = {"(": ")", "{": "}"}


@dataclass(frozen=True)
class Part:
    """A piece of a word.

    Attributes:
        kind: ``text`` as it stands; ``variable``; ``sum`` of ``$((...))``; ``command`` of ``$(...)``.
        text: the text, the variable's name, or what is within the brackets.
        quoted: whether what it expands to stays one word.
        operator: what is done with a variable, like ``:-``; empty where nothing is.
        argument: what follows the operator, as it is written.
    """

    kind: Literal["text", "variable", "sum", "command"]
    text: str
    quoted: bool
    operator: str = ""
    argument: str = ""


@dataclass(frozen=True)
class Word:
    """One word. ``array`` holds the words of ``NAME=(...)``, whose ``parts`` are those before the bracket."""

    parts: tuple[Part, ...]
    line: int
    array: tuple[Word, ...] | None = None


@dataclass(frozen=True)
class Operator:
    """``;``, ``&&``, ``|``, a line's end, a redirection and the like."""

    text: str
    line: int


Token = Word | Operator


def scan(text: str, file: str, line: int = 1) -> list[Token]:
    """The words and operators of a script, in order.

    Args:
        text: of the script.
        file: its name, for messages.
        line: the number of its first line.

    Raises:
        UserError: a quote or bracket that is not closed.
    """
    return _Scanner(text, file, line).tokens()


def scan_quoted(text: str, file: str, line: int) -> tuple[Part, ...]:
    """The parts of a text as it stands between double quotes."""
    scanner = _Scanner(text, file, line)
    parts: list[Part] = []
    while scanner.at < len(text):
        scanner.double_quoted_piece(parts)
    return tuple(parts)


class _Scanner:
    def __init__(self, text: str, file: str, line: int) -> None:
        self.source, self.file, self.first = text, file, line
        self.at = 0

    @property
    def line(self) -> int:
        return self.first + self.source.count("\n", 0, self.at)

    def fail(self, what: str, line: int) -> UserError:
        return UserError(f"{self.file}:{line}: {what}")

    def tokens(self) -> list[Token]:
        found: list[Token] = []
        documents: list[tuple[str, bool]] = []  # here-documents that begin at the line's end: their last lines
        while self.at < len(self.source):
            char = self.source[self.at]
            if char in " \t" or self.source.startswith("\\\n", self.at):
                self.at += 1 if char in " \t" else 2
            elif char == "#":
                end = self.source.find("\n", self.at)
                self.at = len(self.source) if end < 0 else end
            elif self.source[self.at : self.at + 2] in ("<(", ">("):  # the name of what a command is linked to
                found.append(self.whole_command(self.closing(self.at + 1), 1))
            elif self.source.startswith("((", self.at) and self.closing(self.at) == self.closing(self.at + 1) + 1:
                line, test = self.line, self.whole_command(self.closing(self.at), 2)
                if _SETS.search(inner := test.parts[0].text):
                    raise self.fail(
                        f"(({inner})) sets variables in a way that is not followed. Write NAME=VALUE.", line
                    )
                found.append(test)
            elif match := _OPERATOR.match(self.source, self.at):
                found.append(Operator(match[0], self.line))
                self.at = match.end()
                if match[0] == "\n":
                    for last, indented in documents:
                        self.skip_document(last, indented)
                    documents.clear()
            else:
                word = self.word()
                before = found[-1] if found else None
                if isinstance(before, Operator) and before.text.lstrip("0123456789") in ("<<", "<<-"):
                    documents.append(("".join(part.text for part in word.parts), before.text.endswith("-")))
                found.append(word)
        return found

    def whole_command(self, end: int, ends: int) -> Word:
        """A word that only running what is between its brackets would tell: up to ``end``, the last of them."""
        word = Word((Part("command", self.source[self.at + 2 : end - ends + 1], True),), self.line)
        self.at = end + 1
        return word

    def skip_document(self, last: str, indented: bool) -> None:
        began = self.line
        while self.at < len(self.source):
            end = self.source.find("\n", self.at)
            end = len(self.source) if end < 0 else end
            row = self.source[self.at : end]
            self.at = end + 1
            if (row.lstrip("\t") if indented else row) == last:
                return
        raise self.fail(f"the here-document that begins here is not closed by {last}.", began)

    def word(self) -> Word:
        line, parts = self.line, list[Part]()
        start = self.at
        while self.at < len(self.source):
            char = self.source[self.at]
            if char in " \t\n;&|<>":
                break
            if char == ")":
                break
            if char == "(":
                if _ARRAY.fullmatch(self.source[start : self.at]):
                    return Word(tuple(parts), line, self.array())
                break
            if char == "\\":
                if not self.source.startswith("\\\n", self.at):
                    parts.append(Part("text", self.source[self.at + 1 : self.at + 2], True))
                self.at += 2
            elif char == "'":
                end = self.source.find("'", self.at + 1)
                if end < 0:
                    raise self.fail("a single quote is opened here and not closed.", self.line)
                parts.append(Part("text", self.source[self.at + 1 : end], True))
                self.at = end + 1
            elif char == '"':
                self.double_quoted(parts)
            elif char in "$`":
                self.dollar(parts, quoted=False)
            else:
                parts.append(Part("text", char, False))
                self.at += 1
        return Word(tuple(parts), line)

    def array(self) -> tuple[Word, ...]:
        line = self.line
        end = self.closing(self.at)
        inner = scan(self.source[self.at + 1 : end], self.file, line)
        self.at = end + 1
        return tuple(token for token in inner if isinstance(token, Word))

    def double_quoted(self, parts: list[Part]) -> None:
        line, before = self.line, len(parts)
        self.at += 1
        while self.at < len(self.source):
            if self.source[self.at] == '"':
                self.at += 1
                if len(parts) == before:  # "" is a word; "$@" without values is none
                    parts.append(Part("text", "", True))
                return
            self.double_quoted_piece(parts)
        raise self.fail("a double quote is opened here and not closed.", line)

    def double_quoted_piece(self, parts: list[Part]) -> None:
        char = self.source[self.at]
        if char == "\\" and self.source[self.at + 1 : self.at + 2] in ("$", "`", '"', "\\", "\n"):
            if self.source[self.at + 1] != "\n":
                parts.append(Part("text", self.source[self.at + 1], True))
            self.at += 2
        elif char in "$`":
            self.dollar(parts, quoted=True)
        else:
            parts.append(Part("text", char, True))
            self.at += 1

    def dollar(self, parts: list[Part], *, quoted: bool) -> None:
        at = self.at
        if self.source[at] == "`":
            end = self.source.find("`", at + 1)
            if end < 0:
                raise self.fail("a backtick is opened here and not closed.", self.line)
            parts.append(Part("command", self.source[at + 1 : end], quoted))
            self.at = end + 1
        elif self.source.startswith("$((", at) and self.source[(end := self.closing(at + 1)) - 1] == ")":
            parts.append(Part("sum", self.source[at + 3 : end - 1], quoted))
            self.at = end + 1
        elif self.source.startswith("$(", at):
            end = self.closing(at + 1)
            parts.append(Part("command", self.source[at + 2 : end], quoted))
            self.at = end + 1
        elif self.source.startswith("${", at):
            end = self.closing(at + 1)
            parts.append(self.braced(self.source[at + 2 : end], quoted))
            self.at = end + 1
        elif match := re.compile(r"[A-Za-z_]\w*|[\d@*#?$!-]").match(self.source, at + 1):
            parts.append(Part("variable", match[0], quoted))
            self.at = match.end()
        else:
            parts.append(Part("text", "$", quoted))
            self.at += 1

    def braced(self, inner: str, quoted: bool) -> Part:
        match = _BRACED.fullmatch(inner)
        if match is None:
            raise self.fail(f"${{{inner}}} is no variable.", self.line)
        name = match["name"] + (match["index"] or "")
        if match["length"] and not match["rest"]:
            return Part("variable", name, quoted, "length")
        if match["rest"] and (operator := re.match(r":[-=+?]|[-=+?]|%%?|##?|//?|:|\^\^?|,,?", match["rest"])):
            return Part("variable", name, quoted, operator[0], match["rest"][operator.end() :])
        if match["rest"]:
            raise self.fail(f"${{{inner}}} is no variable.", self.line)
        return Part("variable", name, quoted)

    def closing(self, at: int) -> int:
        """Where the bracket that opens at ``at`` is closed."""
        awaited: list[str] = []
        i = at
        while i < len(self.source):
            char = self.source[i]
            if char == "\\":
                i += 1
            elif char == "'" and '"' not in awaited:
                i = self.source.find("'", i + 1)
                if i < 0:
                    break
            elif char == '"':
                if awaited[-1:] == ['"']:
                    awaited.pop()
                else:
                    awaited.append('"')
            elif awaited and char == awaited[-1]:
                awaited.pop()
                if not awaited:
                    return i
            elif char in _OPENED and (awaited[-1:] != ['"'] or self.source[i - 1] == "$"):
                awaited.append(_OPENED[char])
            i += 1
        raise self.fail(f"{self.source[at]} is opened here and not closed.", self.line)
