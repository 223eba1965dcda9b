"""A launch script to the commands that it would start, told without running it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence

from mft_lightning.errors import UserError
from mft_lightning.moving_over.shell_commands import Script
from mft_lightning.moving_over.shell_conditions import all_of, any_of, holds
from mft_lightning.moving_over.shell_expansion import Variables
from mft_lightning.moving_over.shell_syntax import Operator, Token, Word, scan

_REDIRECTION = re.compile(r"\d*(<<<|<<-?|&>>|>>|>&|<&|>\||<>|[<>])|&>>?")
_REFUSED = ("for", "while", "until", "case", "function", "select")


def read_script(text: str, file: str, positional: Sequence[str], environment: Mapping[str, str]) -> Script:
    """The commands of a script.

    Args:
        text: of the script.
        file: its name, for messages.
        positional: the values after its name.
        environment: variables that are given from outside.

    Raises:
        UserError: what cannot be read, or told without running it.
    """
    script = Script(Variables(file, positional, environment))
    try:
        _Reader(scan(text, file), script).read()
    except RecursionError as error:
        raise UserError(f"{file}: is nested too deeply, or evaluates itself. Write the launch out.") from error
    return script


class _Reader:
    def __init__(self, tokens: Sequence[Token], script: Script) -> None:
        self.tokens, self.script, self.at = tokens, script, 0
        self.idle = 0  # how many branches that are not taken are open

    @property
    def variables(self) -> Variables:
        return self.script.variables

    def fail(self, line: int, what: str) -> UserError:
        return UserError(f"{self.variables.file}:{line}: {what}")

    # ---------------------------------------------------------------- tokens

    def peek(self) -> Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def plain(self) -> str | None:
        """The next word where nothing in it is quoted or expands; an operator as it stands."""
        token = self.peek()
        if isinstance(token, Word):
            usual = all(part.kind == "text" and not part.quoted for part in token.parts)
            return "".join(part.text for part in token.parts) if usual and token.array is None else None
        return None if token is None else token.text

    def skip_ends(self) -> None:
        while self.plain() in ("\n", ";", "&"):
            self.at += 1

    # ---------------------------------------------------------------- grammar

    def read(self, *until: str) -> None:
        """Commands up to one of the words, which is left to be read."""
        self.skip_ends()
        while (token := self.peek()) is not None:
            if self.plain() in until:
                return
            self.chain()
            if self.peek() is token:
                raise self.fail(token.line, f"{self.plain()!r} cannot stand here.")
            self.skip_ends()
        if until:
            raise self.fail(self.tokens[-1].line if self.tokens else 1, f"the script ends without {until[-1]!r}.")

    def chain(self) -> None:
        """Commands joined by ``&&``, ``||`` and ``|``."""
        result = self.command()
        while (joint := self.plain()) in ("&&", "||", "|", "|&"):
            self.at += 1
            while self.plain() == "\n":
                self.at += 1
            if joint in ("|", "|&"):
                self.command()
                result = None
            elif result is None:
                self.branch(None, self.command)
            elif result == (joint == "&&"):
                result = self.command()
            else:
                self.branch(False, self.command)

    def command(self) -> bool | None:
        """One command, of whatever kind: whether it succeeds, where that is known."""
        if self.plain() == "!":
            self.at += 1
            result = self.command()
            return None if result is None else not result
        word, token = self.plain(), self.peek()
        if token is None:
            raise self.fail(self.tokens[-1].line, "the script ends where a command must stand.")
        if word in _REFUSED or self.defines_function():
            what = "a function" if self.defines_function() else f"a `{word}`"
            raise self.fail(
                token.line, f"{what} cannot be followed without running it. Write the launch out, and convert that."
            )
        if word == "if":
            self.at += 1
            self.alternatives()
            return None
        if word in ("(", "{"):
            self.at += 1
            self.read(")" if word == "(" else "}")
            self.at += 1
            self.redirections()
            return None
        return self.condition() if word == "[[" else self.simple()

    def defines_function(self) -> bool:
        following = [token.text for token in self.tokens[self.at + 1 : self.at + 3] if isinstance(token, Operator)]
        return isinstance(self.peek(), Word) and following == ["(", ")"]

    def alternatives(self) -> None:
        """What follows ``if``, up to its ``fi``."""
        token = self.peek()
        result, line = self.tested(), token.line if token else 0
        self.branch(result, lambda: self.read("elif", "else", "fi"), line)
        self.branch(None if result is None else not result, self.otherwise, line)
        self.redirections()

    def otherwise(self) -> None:
        word = self.plain()
        self.at += 1
        if word == "elif":
            self.alternatives()
        elif word == "else":
            self.read("fi")
            self.at += 1

    def tested(self) -> bool | None:
        """The commands of a condition, up to ``then``: whether the last succeeds."""
        result: bool | None = None
        self.skip_ends()
        while self.plain() != "then":
            if self.peek() is None:
                raise self.fail(self.tokens[-1].line, "the script ends without 'then'.")
            result = self.command()
            while (joint := self.plain()) in ("&&", "||"):
                self.at += 1
                together = all_of if joint == "&&" else any_of
                result = together([result, self.command()])
            self.skip_ends()
        self.at += 1
        return result

    def branch(self, taken: bool | None, read: Callable[[], object], line: int = 0) -> None:
        """Read what is done only if something holds; where that is not known, it must make no difference.

        Raises:
            UserError: it makes one.
        """
        if taken and not self.idle:
            read()
            return
        if taken is False or self.idle:
            self.idle += 1
            read()
            self.idle -= 1
            return
        before, token = copy.deepcopy(self.script), self.peek()
        read()
        if told := self.script.difference(before):
            raise self.fail(
                line or (token.line if token else 0),
                f"whether {told} depends on what only running the script can tell. Write the launch out as it is "
                "meant, or give the variables that decide it: --set NAME=VALUE.",
            )
        before.variables.asked |= self.variables.asked
        before.variables.defaulted |= self.variables.defaulted
        before.variables.environment = self.variables.environment
        self.script.variables, self.script.commands = before.variables, before.commands
        self.script.exported, self.script.ended = before.exported, before.ended

    # ---------------------------------------------------------------- simple commands

    def redirections(self) -> None:
        while isinstance(token := self.peek(), Operator) and _REDIRECTION.fullmatch(token.text):
            self.at += 2

    def simple(self) -> bool | None:
        words: list[Word] = []
        while True:
            self.redirections()
            token = self.peek()
            if not isinstance(token, Word):
                break
            words.append(token)
            self.at += 1
        if not words or self.script.ended or self.idle:
            return None
        return self.script.carry_out(words, self.again)

    def again(self, text: str, line: int) -> None:
        """Read what ``eval`` is given."""
        _Reader(scan(text, self.variables.file, line), self.script).read()

    # ---------------------------------------------------------------- conditions

    def condition(self) -> bool | None:
        """What stands between ``[[`` and ``]]``."""
        began = self.peek()
        assert began is not None
        words: list[Word | str] = []
        self.at += 1
        while self.plain() != "]]":
            token = self.peek()
            if token is None:
                raise self.fail(began.line, "[[ is opened here and not closed.")
            words.append(token if isinstance(token, Word) else token.text)
            self.at += 1
        self.at += 1
        if self.idle:
            return None
        with self.variables.leniently():
            texts = [word if isinstance(word, str) else self.variables.joined(word.parts, word.line) for word in words]
        return holds(texts, conjunction="&&", disjunction="||")
