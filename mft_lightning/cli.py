"""The table of commands."""

from __future__ import annotations

import gc
import importlib
import io
import os
import platform
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from mft_lightning import __version__, ranks
from mft_lightning.errors import FULL_DISK, UserError, first_line
from mft_lightning.out_of_memory import advice, answering_advice, is_lost_worker, is_out_of_memory, worker_advice

# name -> (module:function, what it does); a command is imported only when it is called
COMMANDS = {
    "init": ("mft_lightning.commands.init:init", "write a project to start from"),
    "fit": ("mft_lightning.commands.fit:fit", "train on task directories"),
    "validate": ("mft_lightning.commands.evaluate:validate", "measure a checkpoint on the validation split"),
    "test": ("mft_lightning.commands.evaluate:test", "measure a checkpoint on the test split"),
    "inspect": ("mft_lightning.commands.inspect:inspect", "show what the model will see and learn from"),
    "prepare": ("mft_lightning.commands.prepare:prepare", "tokenise the data of a run beforehand"),
    "estimate": ("mft_lightning.commands.estimate:estimate", "tell the memory a run needs, and what needs less"),
    "schema": ("mft_lightning.commands.schema:schema", "print the JSON Schema of a run's YAML, for an editor"),
    "predict": ("mft_lightning.commands.predict:predict", "answer the conversations of task directories, and count"),
    "generate": ("mft_lightning.commands.generate:generate", "ask a checkpoint"),
    "chat": ("mft_lightning.commands.chat:chat", "talk to a checkpoint"),
    "consolidate": ("mft_lightning.commands.consolidate:consolidate", "make one model of a sharded checkpoint"),
    "merge": ("mft_lightning.commands.merge:merge", "make an adapter and its base one model"),
    "convert-config": (
        "mft_lightning.commands.convert_config:convert_config",
        "turn a launch or configuration of the original into YAML",
    ),
    "convert-data": ("mft_lightning.commands.convert_data:convert_data", "turn Alpaca and ShareGPT files into a task"),
}
RANKED = ("fit", "validate", "test", "predict")  # commands that run on several processes
ASKING = ("generate", "chat", "predict")  # commands that answer


def main(argv: list[str] | None = None) -> int:
    """Run a command; bad input ends with one message on stderr and exit code 1 (``--verbose`` adds the traceback)."""
    before = dict(os.environ)
    ranks.hear_srun()
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
    launched = ranks.is_launched()
    try:
        return _run(arguments, verbose)
    finally:
        if not launched:  # else the ranks stay together until their launcher ends them
            ranks.leave()
            os.environ.clear()
            os.environ.update(before)


def _run(arguments: list[str], verbose: bool) -> int:
    """Run a command, and tell of its failure once, whichever ranks fail."""
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_usage())
            return 0
        if arguments[0] == "--version":
            print(_versions())
            return 0
        if arguments[0] in RANKED:
            ranks.join()
        _command(arguments[0])(arguments[1:])
        ranks.end(0)
        return 0
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # how Lightning passes on an interrupt
            return _interrupted()
        if isinstance(error.code, int):
            ranks.end(error.code)
        raise
    except Exception as error:
        if not ranks.is_first_to_fail():
            ranks.wait_until_told()
            return 1
        if (message := _message(error, arguments)) is None:
            if not ranks.are_several():
                raise
            traceback.print_exc()
        else:
            if verbose:
                traceback.print_exc()
            _tell(message)
        ranks.told()
        return 1


def _message(error: Exception, arguments: list[str]) -> str | None:
    """What an error is to a user; None where it is a defect of the program."""
    command = arguments[0]
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, BrokenPipeError) and ranks.is_first():
        return "standard output was closed."
    again = ranks.AFTERWARDS.get(command, "")
    if command in ASKING and is_out_of_memory(error):
        return f"{answering_advice(error, command)}{again}"
    if command in RANKED and is_out_of_memory(error):
        return advice(error, arguments[1:])
    if is_lost_worker(error):
        return f"{worker_advice(error)}{again}"
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        where = f"{error.filename}: cannot be written" if error.filename else "a file cannot be written"
        return f"{where} ({error.strerror}). Free some space or mend the file system.{again}"
    if ranks.is_lost_peer(error):
        return f"another rank is gone without a word, or out of reach ({first_line(error)}).{again}"
    return None


def _interrupted() -> int:
    """130 of a shell, but 1 of another rank, where 130 is the orderly end after a signal."""
    if not ranks.is_first():
        return 1
    print("error: interrupted.", file=sys.stderr)
    return 130


def _tell(message: str) -> None:
    """The one line of an error, below the progress bar of rank 0 if another rank has it."""
    begin = "" if ranks.is_first() else f"rank {ranks.number()}: "
    line_end = "\n" if begin and sys.stderr.isatty() else ""
    print(f"{line_end}error: {begin}{message}", file=sys.stderr)


def _command(name: str) -> Callable[[list[str]], None]:
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


def _versions() -> str:
    """This program's version, Python's, and those of what it trains with, none of which is imported for that."""
    from importlib.metadata import PackageNotFoundError, version  # which no other command needs

    lines = [f"mft_lightning {__version__}", f"python {platform.python_version()}"]
    for package in ("torch", "lightning", "transformers", "peft"):
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} is not installed")
    return "\n".join(lines)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m mft_lightning COMMAND [options] [--verbose]", *lines, "COMMAND --help: its options"]
    )
