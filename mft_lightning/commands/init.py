"""``init``: a starter project of one's own, with the configs, the examples, and what to do next."""

from __future__ import annotations

import shlex
import shutil
import sys

from jsonargparse import ArgumentParser

from mft_lightning.aside import written_aside
from mft_lightning.errors import UserError
from mft_lightning.key_errors import parse
from mft_lightning.paths import given_path
from mft_lightning.screen import program, shown
from mft_lightning.shipped import CONFIGS, EXAMPLES, ROOT

COPIED = (
    *(f"{CONFIGS}/*.yaml", f"{EXAMPLES}/model/*.json", f"{EXAMPLES}/quickstart/*/*.jsonl"),
    f"{EXAMPLES}/public_tasks.py",  # which docs/tutorial.md runs
)
README = f"{EXAMPLES}/starter.md"  # what a project has as its README.md


def init(argv: list[str]) -> None:
    """Write a directory in which every shipped config runs as it is."""
    parser = ArgumentParser(prog="python -m mft_lightning init", exit_on_error=False)
    parser.add_argument("directory", type=str, help="The new directory.")
    directory = given_path(parse(parser, argv).directory, "init").absolute()
    if directory.exists() or directory.is_symlink():
        raise UserError(f"init {directory}: is there already. Give a new directory; nothing is overwritten.")
    try:
        with written_aside(directory) as aside:
            for file in sorted(file for names in COPIED for file in ROOT.glob(names)):
                copy = aside / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
            shutil.copyfile(ROOT / README, aside / "README.md")
    except OSError as error:
        raise UserError(f"init {directory}: cannot be written ({error.strerror}).") from error
    print(f"a project to start from: {shown(directory)} (its README.md says what each part is for)")
    python = "python" if program("python") == "python" else shlex.quote(sys.executable)  # from there too
    run = f"{python} -m mft_lightning fit --config {CONFIGS}/quickstart.yaml"
    print(f"train, in about a minute: cd {shown(directory)} && {run}")
