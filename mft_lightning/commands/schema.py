"""``schema``: the keys of ``fit`` as a JSON Schema, by which an editor completes and checks a YAML file."""

from __future__ import annotations

import json
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from mft_lightning.documented import page
from mft_lightning.key_errors import parse
from mft_lightning.run_config import RunConfig
from mft_lightning.schema import keys_of
from mft_lightning.screen import reader_may_leave


class Keys(RunConfig):
    """The keys of a run, without one."""

    def __init__(self) -> None:
        super().__init__([], "schema")

    def parse_arguments(self, parser: Any, args: Any) -> None:
        self.config = Namespace()

    def before_instantiate_classes(self) -> None:
        """Nothing is made."""

    def instantiate_classes(self) -> None:
        """Nothing is made."""

    def _set_seed(self) -> None:
        """Nothing is drawn."""


def schema(argv: list[str]) -> None:
    """Print the schema."""
    parse(ArgumentParser(prog="python -m mft_lightning schema", exit_on_error=False, description=__doc__), argv)
    found = Keys().parser.schema()
    found["description"] = "Keys of a run of mft_lightning."
    for key, node in keys_of(found):
        node["description"] = f"{node['description']} See {page(key)}."
    with reader_may_leave():
        print(json.dumps(found, indent=2))
