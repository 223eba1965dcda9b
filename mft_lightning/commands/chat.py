"""``chat``: a conversation with a checkpoint in a terminal, or with what is piped in."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import NamedTuple

from jsonargparse import ArgumentParser, Namespace

from mft_lightning.commands.asking import (
    add_generation_options,
    add_model_options,
    check_model_options,
    check_text,
    generation_settings,
    load_asked,
)
from mft_lightning.commands.conversation import TAKEN_BACK, Talk
from mft_lightning.errors import UserError
from mft_lightning.key_errors import parse
from mft_lightning.model.generation import GenerationSettings
from mft_lightning.out_of_memory import answering_advice, is_out_of_memory
from mft_lightning.paths import given_file
from mft_lightning.quiet import quieten
from mft_lightning.screen import printable, reader_may_leave

FENCE = '"""'  # begins and ends what is longer than a line
HELP = f"""\
/system TEXT   the model is told TEXT in front of everything from now on, and the conversation starts anew;
               without TEXT it is told nothing
/reset         start anew under the same system turn
/save FILE     write the conversation as a line of training data; /save! FILE replaces a file
/help          this
/quit          end, as Ctrl-D does
{FENCE}            begins what is longer than a line, and ends it; nothing in it is a command
//text         says /text
Ctrl-C         stops the answer; at an empty prompt, twice, ends"""


class _LeaveError(Exception):
    """``/quit``."""


def chat(argv: list[str]) -> None:
    """Answer what is typed, or every line of a standard input that is no terminal, in one conversation."""
    quieten()
    options, settings = _options(argv)
    talk = Talk(load_asked(options), settings, options.system)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # told of by the line
    if sys.stdin.isatty() and sys.stdout.isatty():
        _in_terminal(talk)
    else:
        with reader_may_leave():
            _from_pipe(talk)


def _options(argv: list[str]) -> tuple[Namespace, GenerationSettings]:
    parser = ArgumentParser(prog="python -m mft_lightning chat", exit_on_error=False)
    parser.add_argument("--system", type=str, help="What the model is told in front of everything.")
    add_model_options(parser)
    add_generation_options(parser)
    options = parse(parser, argv)
    settings = generation_settings(options)
    check_model_options(options)
    check_text(options, "system")
    return options, settings


def _from_pipe(talk: Talk) -> None:
    """Answers alone on standard output; what is wrong with a message ends the command, naming its first line."""
    lines = enumerate(sys.stdin, start=1)

    def read(_: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line[1].removesuffix("\n")

    with suppress(_LeaveError):
        for number, line in lines:
            try:
                message = _message(line.removesuffix("\n"), read)
                note = _handled(talk, message, tell=_write, answering=nullcontext(lambda: False))
            except UserError as error:
                raise UserError(f"standard input, line {number}: {error}") from error
            _note(note)


def _in_terminal(talk: Talk) -> None:
    """Until Ctrl-D, ``/quit``, or a second Ctrl-C at an empty prompt; an error is told, and costs one message."""
    typed = _line_editor()
    interrupts = _Interrupts()
    print("/help tells what can be typed; Ctrl-C stops an answer, Ctrl-D ends.")
    warned = False
    with interrupts.heard():
        while True:
            before = talk.rounds
            try:
                with interrupts.raised():
                    message = _message(input("> "), input)
            except EOFError:
                print()
                return
            except UserError as error:
                print()
                _note(str(error))
                continue
            except KeyboardInterrupt:
                print()
                if typed():  # that line is gone now
                    continue
                if warned:
                    return
                warned = True
                _note("Ctrl-C again, or Ctrl-D, ends")
                continue
            warned = False
            try:
                note = _handled(talk, message, tell=lambda text: _write(printable(text)), answering=interrupts.kept())
                _note(note)
            except _LeaveError:
                return
            except KeyboardInterrupt:
                _note(f"broken off. {TAKEN_BACK if talk.rounds is before else 'What stands there counts.'}")
            except UserError as error:
                _note(str(error))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                _note(f"{answering_advice(error, 'chat')} {TAKEN_BACK}")


def _line_editor() -> Callable[[], str]:
    """Let ``input`` edit lines, with a history; what tells of the line as far as it is typed."""
    try:
        import readline
    except ImportError:  # some builds of Python have none; the terminal alone edits then
        return str
    readline.parse_and_bind("set enable-bracketed-paste on")  # what is pasted is one message, whatever its lines
    return readline.get_line_buffer


class _Interrupts:
    """What Ctrl-C does: it is raised at the prompt, kept during an answer until someone asks, and nothing elsewhere.

    A second one during an answer breaks it off in the middle of a token. One that was raised is the last until the next
    prompt or answer, so that none disturbs what is done about it.
    """

    def __init__(self) -> None:
        self._raises = self._keeps = self._received = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        before = signal.signal(signal.SIGINT, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def raised(self) -> Iterator[None]:
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    @contextmanager
    def kept(self) -> Iterator[Callable[[], bool]]:
        """Yields what tells whether one came."""
        self._received, self._keeps = False, True
        try:
            yield lambda: self._received
        finally:
            self._keeps = self._raises = False

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._raises:
            self._keeps = self._raises = False
            raise KeyboardInterrupt
        if self._keeps:
            self._received = self._raises = True


class _Message(NamedTuple):
    """What was said; ``typed``, as one line, it may be a command."""

    text: str
    typed: bool


def _message(line: str, read: Callable[[str], str]) -> _Message:
    """The message that ``line`` begins: all lines between two fences, or it alone.

    Raises:
        UserError: there is no second fence.
    """
    if "\n" in line:  # no key types that: it was pasted
        return _Message(line.rstrip("\n"), typed=False)
    if not line.startswith(FENCE):
        return _Message(line, typed=True)
    text = line.removeprefix(FENCE)
    while not text.endswith(FENCE):
        try:
            text += "\n" + read("… ")
        except EOFError as error:
            raise UserError(f"{FENCE} opens a message there that no {FENCE} ends. Nothing of it was said.") from error
    return _Message(text.removesuffix(FENCE).strip("\n"), typed=False)


def _handled(
    talk: Talk,
    message: _Message,
    *,
    tell: Callable[[str], None],
    answering: AbstractContextManager[Callable[[], bool]],
) -> str | None:
    """Do what a message asks for; what to say of it, if anything.

    Args:
        talk: the conversation.
        message: what was said.
        tell: is given the answer, piece by piece.
        answering: entered for as long as that takes; yields what tells whether it is to stop.
    """
    said, typed = message
    try:
        said.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"it is not UTF-8 (character {error.start + 1}).") from error
    if not said.strip():
        return None
    if typed and said.startswith("/"):
        if not said.startswith("//"):
            return _obeyed(talk, said.strip())
        said = said.removeprefix("/")
    told = False

    def telling(text: str) -> None:
        nonlocal told
        told = True
        tell(text)

    with answering as stopped:
        try:
            return talk.say(said, tell=telling, stopped=stopped)
        finally:
            if told:
                _write("\n")


def _obeyed(talk: Talk, said: str) -> str:
    """Carry out a command; what to say of it."""
    name, _, rest = said.partition(" ")
    rest = rest.strip()
    if name == "/help":
        return HELP
    if name == "/quit":
        raise _LeaveError
    if name == "/reset":
        talk.start_anew()
        return "starting anew"
    if name == "/system":
        talk.system = rest or None
        talk.start_anew()
        return f"starting anew, {'with that' if rest else 'without a'} system turn"
    if name in ("/save", "/save!"):
        if not rest:
            raise UserError(f"{name}: give a file.")
        return talk.save(given_file(rest, name), overwrite=name == "/save!")
    raise UserError(f"{name}: there is no such command; /help lists them. //… says what begins with a slash.")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(text: str | None) -> None:
    """A line that is not the model's, on standard error."""
    if text is not None:
        print(text if text == HELP else f"({printable(text)})", file=sys.stderr, flush=True)
