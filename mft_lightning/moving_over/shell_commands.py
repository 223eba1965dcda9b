"""What the commands of a script do to its variables; the others are kept, not run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from mft_lightning.errors import UserError
from mft_lightning.moving_over.shell_conditions import holds
from mft_lightning.moving_over.shell_expansion import Variables, as_written
from mft_lightning.moving_over.shell_syntax import Word

_ASSIGNMENT = re.compile(r"(?P<name>[A-Za-z_]\w*)(?P<add>\+?)=(?P<value>.*)", re.DOTALL)
_DECLARING = ("export", "local", "declare", "typeset", "readonly")
_SETTING = ("let", "read", "mapfile", "readarray", "getopts")  # in ways that are not followed
_PREFIXES = ("exec", "nohup", "time", "command", "eval")


@dataclass(frozen=True)
class Command:
    """A command with its words, each with its line; the first is its name."""

    words: tuple[tuple[str, int], ...]

    @property
    def line(self) -> int:
        return self.words[0][1]


@dataclass
class Script:
    """What a script does, as far as it was read.

    Attributes:
        variables: that it has set.
        commands: that it would start, but for those that set something.
        exported: the names of variables that it gives to all that it starts; values may be secrets.
        ended: the line of the ``exit`` that it came to; 0 where it came to none.
    """

    variables: Variables
    commands: list[Command] = field(default_factory=list)
    exported: list[str] = field(default_factory=list)
    ended: int = 0

    def carry_out(self, words: list[Word], again: Callable[[str, int], None]) -> bool | None:
        """Do what a simple command does to the script, or keep the command.

        Args:
            words: of the command, not empty.
            again: reads a text as more of the script, from a line on.

        Returns:
            Whether it succeeds; None where that is not known.
        """
        assigned = []
        while words and (match := _assignment(words[0])) is not None:
            assigned.append((match, words.pop(0)))
        if not words:
            for match, word in assigned:
                self.assign(match, word)
            return True
        name = self.variables.split(words[0])
        if name[:1] and name[0] in _DECLARING:
            for word in words[1:]:
                if (match := _assignment(word)) is not None:
                    self.assign(match, word)
                    if name[0] == "export":
                        self.exported.append(match["name"])
            return True
        if name[:1] and name[0] in ("[", "test"):
            return self.test(words, bracket=name[0] == "[")
        if name[:1] and name[0] in ("echo", "printf"):
            return None
        fields = self.variables.fields(words)
        while fields and fields[0][0] in _PREFIXES:
            if fields[0][0] == "eval":
                line = fields[0][1]
                text = " ".join(text for text, _ in fields[1:])
                again(text, line)
                return None
            fields.pop(0)
        if not fields:
            return True
        known = {"true": True, ":": True, "false": False}
        if (first := fields[0][0]) in known:
            return known[first]
        if first == "exit":
            self.ended = fields[0][1]
            return None
        if first == "shift":
            number = int(fields[1][0]) if len(fields) > 1 and fields[1][0].isdecimal() else 1
            self.variables.positional = self.variables.all_positional()[number:]
            return True
        if first == "unset":
            for text, _ in fields[1:]:
                self.variables.assign(text, "")
            return True
        if (
            first in _SETTING
            or re.match(r"\w+\[[^]]*\]\+?=", first)
            or [text for text, _ in fields[:2]] == ["set", "--"]
        ):
            raise UserError(
                f"{self.variables.file}:{fields[0][1]}: {first} sets variables in a way that is not followed. "
                "Write NAME=VALUE for each."
            )
        if first.startswith("-"):
            raise UserError(
                f"{self.variables.file}:{fields[0][1]}: a command begins with {first}. The line before it ends without "
                "a backslash, with blanks after it, or is a comment, where the shell ends the command too. Mend that."
            )
        self.commands.append(Command(tuple(fields)))
        return None

    def assign(self, match: re.Match[str], word: Word) -> None:
        name = match["name"]
        if word.array is not None:
            items = [text for text, _ in self.variables.fields(word.array)]
            self.variables.assign(name, [*self.variables.array(name), *items] if match["add"] else items)
            return
        value = self.variables.joined(word.parts, word.line).partition("=")[2]
        if match["add"]:
            value = (self.variables.value(name) or "") + value
        self.variables.assign(name, value)

    def test(self, words: list[Word], *, bracket: bool) -> bool | None:
        """``[ ... ]`` or ``test ...``."""
        with self.variables.leniently():
            texts = [text for text, _ in self.variables.fields(words)][1:]
        if bracket and texts[-1:] != ["]"]:
            raise UserError(f"{self.variables.file}:{words[0].line}: [ is opened here and not closed.")
        return holds(texts[:-1] if bracket else texts, conjunction="-a", disjunction="-o")

    def difference(self, before: Script) -> str:
        """What has changed since then that a launch can depend on; empty where nothing has."""
        was, now = before.variables.values, self.variables.values
        if changed := sorted(name for name in now if now[name] != was.get(name)):
            return f"{', '.join(changed)} {'is' if len(changed) == 1 else 'are'} set so"
        for command in self.commands[len(before.commands) :]:
            if any(".py" in text for text, _ in command.words):
                return f"`{' '.join(as_written(text) for text, _ in command.words[:2])}` is started"
        return ""


def _assignment(word: Word) -> re.Match[str] | None:
    """Of a word that sets a variable, its name: what stands before the ``=`` without quotes."""
    begin = ""
    for part in word.parts:
        if part.kind != "text" or part.quoted:
            break
        begin += part.text
    return _ASSIGNMENT.match(begin)
