"""The launch in a script: the training program with its options, and the launcher's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from mft_lightning.errors import UserError, nearest
from mft_lightning.moving_over.ignored_options import LAUNCHERS_OWN
from mft_lightning.moving_over.old_options import OPTIONS
from mft_lightning.moving_over.old_values import Given
from mft_lightning.moving_over.shell_commands import Command, Script
from mft_lightning.moving_over.shell_expansion import as_written

LAUNCHING_MODULES = ("distributed.launch", "distributed.run", "accelerate.commands.launch", "deepspeed.launcher.runner")
TELLING = ("data_paths", "pretrained_model_path", "config_path", "train_config")  # what tells the training program
OTHERS = ("xxpo_accelerate", "offline_tokenization")
_OPTION = re.compile(r"--(?P<name>[A-Za-z][\w-]*)(=(?P<value>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Launch:
    """The training program of a script, and what it and its launcher were given.

    Attributes:
        program: its name.
        line: where it is started.
        options: of the program, by name.
        launched: of the launcher, by name.
        twice: options of the program that were given more than once; the last counts.
    """

    program: str
    line: int
    options: dict[str, Given] = field(default_factory=dict)
    launched: dict[str, Given] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)


def find_launch(script: Script) -> Launch:
    """The one launch of a script.

    Raises:
        UserError: there is none, or several, or one of another program.
    """
    file = script.variables.file
    found = [launch for command in script.commands if (launch := _launch(command, file)) is not None]
    if not found:
        seen = ", ".join(dict.fromkeys(f"{as_written(c.words[0][0])} ({c.line})" for c in script.commands)) or "nothing"
        ended = _ended(script) if script.ended else ""
        raise UserError(
            f"{file}: starts no training of the original: no program with --data_paths or --train_config.{ended} "
            f"It starts {seen}. Give the script that does."
        )
    if len(found) > 1:
        lines = " and ".join(str(launch.line) for launch in found)
        raise UserError(f"{file}: starts several trainings, in the lines {lines}. Leave one in.")
    return found[0]


def _ended(script: Script) -> str:
    """What to say of the exit that a script came to."""
    told = f" It comes to the exit in line {script.ended} before"
    if unset := [name for name, value in script.variables.defaulted.items() if not value]:
        return f"{told}, where {', '.join(unset)} {'is' if len(unset) == 1 else 'are'} not given: --set NAME=VALUE."
    given = len(script.variables.positional)
    return f"{told}, where {given or 'none'} of its values {'is' if given == 1 else 'are'} given."


def _launch(command: Command, file: str) -> Launch | None:
    """The launch that a command is; None of any other command."""
    words = list(command.words)
    start = _program(words)
    if start is None:
        return None
    program = words[start][0]
    stem = PurePath(program).stem if program.endswith(".py") else program.rpartition(".")[2]
    if any(name in stem for name in OTHERS):
        raise UserError(f"{file}:{words[start][1]}: {program} is no training that is done here. Nothing is converted.")
    launch = Launch(program, words[start][1])
    _read_options(words[start + 1 :], file, launch.options, launch.twice, own=True)
    if not any(name in launch.options for name in TELLING):
        return None
    _read_options(words[:start], file, launch.launched, [], own=False)
    return launch


def _program(words: Sequence[tuple[str, int]]) -> int | None:
    """Which word names the training program: a Python file, or a module that is no launcher."""
    for i, (word, _) in enumerate(words):
        if word.endswith(".py"):
            return i
        modular = i > 0 and words[i - 1][0] in ("-m", "--module")
        if modular and not any(word.endswith(module) for module in LAUNCHING_MODULES):
            return i
    return None


def _read_options(
    words: Sequence[tuple[str, int]], file: str, found: dict[str, Given], twice: list[str], *, own: bool
) -> None:
    """Read ``--name value``, ``--name=value`` and ``--name``.

    Args:
        words: of a command, each with its line.
        file: the script's name.
        found: takes the options, by name; the last of a name counts.
        twice: takes the names of options that were given more than once.
        own: whether they are the training program's, whose words must all be options.
    """
    at = 0
    while at < len(words):
        word, line = words[at]
        at += 1
        match = _OPTION.fullmatch(word)
        if match is None:
            if own:
                raise UserError(f"{file}:{line}: {_no_option(word)}")
            continue
        name = match["name"].replace("-", "_")
        name = _whole_name(name, f"{file}:{line}: {word}") if own else name
        value: str | None = match["value"]
        takes = at < len(words) and not _OPTION.fullmatch(words[at][0])
        flag = name in OPTIONS and OPTIONS[name].kind == "flag"
        if value is None and takes and (not flag or words[at][0].lower() in ("true", "false", "1", "0")):
            value = words[at][0]
            at += 1
        if value is None and name in OPTIONS and OPTIONS[name].kind not in ("flag", "any"):
            if not own:
                continue
            raise UserError(f"{file}:{line}: --{name} has no value. Give it one; it may come from an empty variable.")
        if name in found and found[name].value != value:
            twice.append(name)
        found[name] = Given("true" if value is None else value, f"{file}:{line}: --{name}")


def _no_option(word: str) -> str:
    """What to say of a word that stands where an option of the program must."""
    written = as_written(word)
    if written[:1] == "$" and written[1:].isidentifier():
        return (
            f"{written} is left open, and may hold options. Give what it holds, or nothing: --set {written[1:]}= on "
            "convert-config's command line."
        )
    return f"{written!r} stands where an option of the program must. A value with blanks needs quotes."


def _whole_name(name: str, where: str) -> str:
    """An option's name where it was cut short, as argparse lets it be.

    Raises:
        UserError: there is no such option, or there are several.
    """
    if name in OPTIONS:
        return name
    own = [known for known in OPTIONS if known not in LAUNCHERS_OWN]
    longer = [known for known in own if known.startswith(name)]
    if len(longer) == 1:
        return longer[0]
    if longer:
        raise UserError(f"{where}: is short for several options: {', '.join(longer)}. Write it out.")
    raise UserError(f"{where}: the original has no such option.{nearest(name, own, 0.75)}")
