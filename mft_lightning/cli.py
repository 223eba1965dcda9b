"""The table of commands."""

from __future__ import annotations

import gc
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from mft_lightning import __version__, ranks
from mft_lightning.errors import UserError, first_line

# name -> (module:function, what it does); a command is imported only when it is called
COMMANDS = {
    "fit": ("mft_lightning.commands.fit:fit", "train on task directories"),
    "validate": ("mft_lightning.commands.evaluate:validate", "measure a checkpoint on the validation split"),
    "test": ("mft_lightning.commands.evaluate:test", "measure a checkpoint on the test split"),
    "inspect": ("mft_lightning.commands.inspect:inspect", "show what the model will see and learn from"),
    "prepare": ("mft_lightning.commands.prepare:prepare", "tokenise the data of a run beforehand"),
    "generate": ("mft_lightning.commands.generate:generate", "ask a checkpoint"),
    "merge": ("mft_lightning.commands.merge:merge", "make an adapter and its base one model"),
}
RANKED = ("fit", "validate", "test")  # commands that run on several processes
NOT_YET = ("predict", "chat", "convert-config", "estimate")


def main(argv: list[str] | None = None) -> int:
    """Run a command; bad input ends with one message on stderr and exit code 1 (``--verbose`` adds the traceback)."""
    # Read when torch is imported. Waiting threads spin by default, and then a busy neighbour on a laptop's cores makes
    # the steps of a small model many times slower (docs/training.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Processes tokenise, and a process that tokenised with threads warns at every fork of a loader's.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not ranks.is_first():  # what is said of a run is said once; errors go to standard error
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # for as long as the process lives
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of few letters shows the others by their numbers
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if argv is None else argv
    verbose = "--verbose" in arguments
    arguments = [word for word in arguments if word != "--verbose"]
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_usage())
            return 0
        if arguments[0] == "--version":
            print(__version__)
            return 0
        if arguments[0] in RANKED:
            ranks.join()
        _command(arguments[0])(arguments[1:])
        ranks.end()
    except UserError as error:
        if ranks.is_first_to_fail():
            if verbose:
                traceback.print_exc()
            _tell(str(error))
        return 1
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise  # else it is how Lightning passes on an interrupt
        if ranks.is_first():
            print("error: interrupted.", file=sys.stderr)
        return 130 if ranks.is_first() else 1  # of another rank 130 is the orderly end after a signal
    except BrokenPipeError:
        print("error: standard output was closed.", file=sys.stderr)
        return 1
    except Exception as error:
        if not ranks.is_first_to_fail():
            return 1
        if not ranks.is_lost_peer(error) or verbose:
            raise
        why = f"another rank is gone without a word, or out of reach ({first_line(error)})"
        _tell(f"{why}. Go on with --ckpt_path last.")
        return 1
    return 0


def _tell(message: str) -> None:
    """The one line of an error, below the progress bar of rank 0 if another rank has it."""
    begin = "" if ranks.is_first() else f"rank {ranks.number()}: "
    line_end = "\n" if begin and sys.stderr.isatty() else ""
    print(f"{line_end}error: {begin}{message}", file=sys.stderr)


def _command(name: str) -> Callable[[list[str]], None]:
    if name in NOT_YET:
        raise UserError(f"{name}: this command is not there yet. There are {', '.join(COMMANDS)}.")
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command. There are {', '.join(COMMANDS)}.")
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(_imported(module), function)


def _imported(module: str) -> ModuleType:
    """A command's module, imported without garbage collections.

    They find nothing in thousands of modules that are there to stay, and took a seventh of the time from launch to a
    command's first line (``benchmarks/launch.py``).
    """
    if module in sys.modules:
        return sys.modules[module]
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()  # nor do later ones look through them
        gc.enable()


def _usage() -> str:
    lines = [f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m mft_lightning COMMAND [options] [--verbose]", *lines, "COMMAND --help: its options"]
    )
