"""``convert-config``: the original's launch scripts and ``*_train_config.json`` files as YAML for ``fit``."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import takewhile

from jsonargparse import ArgumentParser

from mft_lightning.aside import written_aside
from mft_lightning.errors import UserError, first_line, nearest
from mft_lightning.key_errors import parse
from mft_lightning.moving_over.original import convert
from mft_lightning.paths import given_file, given_path

_SETTING = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", re.DOTALL)


def convert_config(argv: list[str]) -> None:
    """Print the YAML, or write it; what is left open is told on standard error."""
    parser = ArgumentParser(prog="python -m mft_lightning convert-config", exit_on_error=False)
    parser.add_argument("config", type=str, help="run_gpt_*.sh, a launch of mft_accelerate.py, or *_train_config.json.")
    parser.add_argument(
        "values",
        nargs="*",
        type=str,
        default=[],
        help="What stands after a script's name: per-device batch size, tensor parallel, data parallel, epochs.",
    )
    parser.add_argument("--output", type=str, help="A new YAML file. Default: standard output.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a file that is there.")
    parser.add_argument(
        "--set", dest="known", action="append", default=[], metavar="NAME=VALUE", help="A variable that is left open."
    )
    _check_options(argv, parser)
    options = parse(parser, argv)
    known = {}
    for setting in options.known:
        if (match := _SETTING.fullmatch(setting)) is None:
            raise UserError(f"--set {setting}: is not NAME=VALUE.")
        known[match["name"]] = match["value"]
    output = given_file(options.output, "--output") if options.output is not None else None
    if output is not None and output.exists() and not options.overwrite:
        raise UserError(f"--output {output}: is there already. Give a new file, or --overwrite.")
    converted = convert(given_path(options.config, "convert-config"), options["values"], known)
    if output is None:
        print(converted.text, end="")
    else:
        try:
            with written_aside(output) as aside:
                aside.write_text(converted.text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output {output}: cannot be written ({first_line(error)}).") from error
        print(f"written: {output}")
    for name, keys in converted.draft.left_open().items():
        print(f"note: {name} is left open: {', '.join(keys)} needs it.", file=sys.stderr)


def _check_options(argv: Sequence[str], parser: ArgumentParser) -> None:
    """Refuse an option that is none of this command's: it may be one to hand on to the script.

    Raises:
        UserError: there is one before ``--``.
    """
    known = parser._option_string_actions
    for word in takewhile(lambda word: word != "--", argv):
        if word.startswith("--") and (name := word.partition("=")[0]) not in known:
            raise UserError(
                f"{name}: convert-config has no such option.{nearest(name, known)} What a script takes as its "
                f"values stands after --, as in: convert-config run.sh -- {word}"
            )
