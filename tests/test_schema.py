"""The JSON Schema of a run's YAML takes what the parser takes, and says where each key is documented."""

from __future__ import annotations

import copy
import json
import re
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mft_lightning.commands.schema import Keys
from mft_lightning.documented import page
from mft_lightning.errors import UserError
from mft_lightning.run_parser import RunParser
from mft_lightning.schema import Node, allowed, keys_of

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
VALUES: list[Any] = [True, 5, 2.5, "word", ["word"], [1], [], {"a": 1}, {"a": "x"}, {"a": 2.5}]
Valid = Callable[[Any], bool]


@pytest.fixture(scope="module")
def parser() -> RunParser:
    return Keys().parser


@pytest.fixture(scope="module")
def schema(parser: RunParser) -> Node:
    return parser.schema()


@pytest.fixture(scope="module")
def valid(schema: Node) -> Valid:
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(json.loads(json.dumps(schema)))
    return lambda config: validator.is_valid(config)


def changed(config: Any, key: str, value: Any) -> Any:
    config = copy.deepcopy(config)
    *groups, last = key.split(".")
    held = config
    for group in groups:
        held = held.setdefault(group, {})
    held[last] = value
    return config


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_it_takes_shipped_configs_as_they_are_and_as_they_are_printed(
    parser: RunParser, valid: Valid, file: Path
) -> None:
    assert valid(yaml.safe_load(file.read_text()))
    keys = parser.keys(["--config", str(file)])
    printed = parser.dump(keys, skip_unset=False)
    assert valid(yaml.safe_load(printed)) and "# most tokens of a conversation.\n  seq_length: " in printed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.seq_lenght", 5),
        ("optimizer", {"lr": 1}),
        ("data.seed", 5),
        ("data.seq_length", "many"),
        ("data.seq_length", 2.5),
        ("data.seq_length", None),
        ("data.padding_mode", "packed"),
        ("model.peft_type", "lorra"),
        ("model.optimizer", "adam"),
        ("model.weighted_loss_mode", {"class_pth": "own.HarderFirst"}),
        ("model.lora.target_modules", "dense"),
        ("evaluation.at_start", "yes please"),
        ("trainer.val_check_interval", 5),
        ("trainer.strategy", "deepspeed"),
        ("trainer.precision", "bf17"),
        ("trainer.callbacks", [{"class_pth": "a.B"}]),
        ("trainer.max_steps", "${not a name}"),
    ],
)
def test_it_refuses_wrong_keys_and_values(valid: Valid, key: str, value: object) -> None:
    assert not valid(changed({}, key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("$schema", "./mft.schema.json"),
        ("trainer.max_steps", "${STEPS:-5}"),
        ("data.data_paths", ["${DATA}/a", "b"]),
        ("trainer.strategy", {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"x": 1}}),
        ("trainer.callbacks", [{"class_path": "my.Callback"}]),
        ("trainer.logger", [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "x"}}]),
        ("trainer.logger", False),
        ("model.optimizer", "torch.optim.SGD"),
        ("model.optimizer", "${OPTIMIZER:-adamw}"),
        ("model.weighted_loss_mode", {"class_path": "own.HarderFirst", "init_args": {"power": 2}}),
        ("trainer.val_check_interval", None),
    ],
)
def test_it_takes_classes_by_their_path_and_environment_variables(valid: Valid, key: str, value: object) -> None:
    assert valid(changed({}, key, value))


def test_it_agrees_with_the_parser_on_every_key(parser: RunParser, schema: Node, valid: Valid, tmp_path: Path) -> None:
    """Every own key with values of two kinds, which differ from key to key, and every eighth with null."""
    base = yaml.safe_load((ROOT / "configs" / "full.yaml").read_text())
    accepted = refused = 0
    for number, (key, _) in enumerate(keys_of(schema)):
        if key.startswith("trainer."):  # Lightning's
            continue
        kinds = [VALUES[number % len(VALUES)], VALUES[(7 * number + 3) % len(VALUES)]]
        for value in kinds if number % 8 else [*kinds, None]:
            config = changed(base, key, value)
            try:
                if value is None:
                    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
                    parser.keys(["--config", str(tmp_path / "config.yaml")])
                else:  # a fifth of the time
                    parser.parse_object(config)
                takes = True
            except (ArgumentError, UserError) as error:
                takes = "does not divide" in str(error)  # a number that does not suit the devices, not a wrong one
            assert valid(config) == takes, (key, value)
            accepted, refused = accepted + takes, refused + (not takes)
    assert accepted > 20 and refused > 100


def test_every_key_has_a_description_and_a_section_that_names_it(schema: Node) -> None:
    for key, node in keys_of(schema):
        assert node.get("description"), key
        file, _, section = page(key).partition("#")
        text = (ROOT / file).read_text()
        titles = [
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)
        ]
        assert not section or section in titles, (key, section)
        if not key.startswith("trainer."):
            assert re.search(rf"[`.]{key.rpartition('.')[2]}\b", text), f"{file} does not name {key}"


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"type": "integer"}, "an integer"),
        ({"type": ["integer", "null"]}, "an integer, or null"),
        ({"enum": ["a", "b", None]}, "one of a, b, or null"),
        ({"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": {"type": "number"}}]},
         "text, a list of numbers, or null"),
        ({"anyOf": [{"$ref": "#/$defs/Logger"}, {"type": "boolean"}, {"$ref": "#/$defs/variable"}]},
         "a Logger by its class_path, or true or false"),
        ({"anyOf": [{"enum": ["adamw"]}, {"$ref": "#/$defs/Optimizer"}]}, "adamw, or an Optimizer by its class_path"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "a mapping of integers"),
    ],
)  # fmt: skip
def test_what_a_key_takes_is_said_in_words(node: Node, words: str) -> None:
    assert allowed(node) == words
