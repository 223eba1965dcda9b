"""Commands of the program one after the other in the same processes, which saves most of the tests' time.

    torchrun --nproc-per-node 2 tests/integration/in_series.py commands.json

The ranks that ``layouts.py`` starts it on need not import everything again. The file holds a list of command lines;
the first that fails ends the series with its exit code.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mft_lightning.cli import main
from mft_lightning.run_config import RunConfig


def setup_once() -> Callable[..., None]:
    """A ``RunConfig.setup_parser`` that makes the parser of each command once: a quarter of a short run's time."""
    make, made = RunConfig.setup_parser, {}

    def setup(config: RunConfig, *arguments: Any) -> None:
        command = config.command[0]
        if command not in made:
            make(config, *arguments)
            made[command] = config.parser
        config.parser = made[command]

    return setup


if __name__ == "__main__":
    torch.set_num_threads(1)
    RunConfig.setup_parser = setup_once()  # type: ignore[method-assign]
    for line in json.loads(Path(sys.argv[1]).read_text()):
        if code := main(line):
            sys.exit(code)
