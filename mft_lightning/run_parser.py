"""The parser of a run's keys: what they take, how they are printed, and where they are documented."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from jsonargparse import Namespace
from jsonargparse._link_arguments import ActionLink
from lightning.pytorch.cli import LightningArgumentParser

from mft_lightning.commented import commented
from mft_lightning.documented import page
from mft_lightning.errors import UserError, nearest
from mft_lightning.key_errors import follows, parse
from mft_lightning.moving_over.other_names import key_here
from mft_lightning.refusals import refusal
from mft_lightning.schema import Node, choices, class_form, keys_of, schema_of, takes
from mft_lightning.training.layout import ACCELERATORS
from mft_lightning.training.strategies import TAKEN as STRATEGIES
from mft_lightning.training.trainer import ELSEWHERE, PROFILERS, WEIGHTS_DTYPE
from mft_lightning.variables import escaped, read
from mft_lightning.yaml_keys import key_lines

DRY_RUN = "dry_run"  # fit's option that is of one start, and no key of the run


class RunParser(LightningArgumentParser):
    """A parser whose ``--print_config`` explains every key, and whose messages say what a key takes."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._places: dict[str, str] = {}  # of the keys of files: file and line, of the last file that has it

    def keys(self, argv: Sequence[str]) -> Namespace:
        """The keys of a command line.

        Raises:
            UserError: a key that is none, or a value that its key does not take.
        """
        self._places = {}
        with self.placing(argv):
            found = parse(self, argv, self.schema, page, key_here)
            for key, node in keys_of(self.schema()):
                value = found.get(key, ...)
                # jsonargparse lets it pass (``_check_value_key``): null is its own word for what is not given
                if (value is None and "null" not in takes(node)) or (isinstance(value, str) and _no_word(value, node)):
                    raise UserError(refusal(key, value, node, page))
        return found

    @contextmanager
    def placing(self, argv: Sequence[str]) -> Iterator[None]:
        """Errors that begin with a key are raised with its place in a file, and the page that it is documented on.

        Args:
            argv: the command line that the keys are of.
        """
        try:
            yield
        except UserError as error:
            raise UserError(self._placed(str(error), argv)) from error

    def _placed(self, message: str, argv: Sequence[str]) -> str:
        """A message that begins with a key, with its page and its place in a file, unless the command line has it."""
        key, colon, rest = message.partition(":")
        if "See " not in rest and any(f"{known}.".startswith(f"{key}.") for known, _ in keys_of(self.schema())):
            rest = f"{rest.removesuffix('.')}. See {page(key)}."
        place = self._places.get(key)
        given = [word.partition("=")[0].removesuffix("+") for word in argv]
        if place is None or any(f"{option}.".startswith(f"--{key}.") for option in given):
            return f"{key}{colon}{rest}"
        return f"{key} ({place}){colon}{rest}"

    def _add_signature_parameter(
        self, container: Any, nested_key: Any, param: Any, *given: Any, **options: Any
    ) -> None:
        """One argument of a class; one without a type and a default is as needed as any other.

        Lightning asks for ``fail_untyped=False``, with which jsonargparse makes it None where it is left out
        (``_signatures.py`` in 4.53).
        """
        if param.annotation is inspect.Parameter.empty and param.default is inspect.Parameter.empty:
            param = replace(param, annotation=Any)
        super()._add_signature_parameter(container, nested_key, param, *given, **options)

    def parse_path(self, cfg_path: Any, *given: Any, **options: Any) -> Namespace:
        """The keys of a file.

        Raises:
            UserError: it is not UTF-8.
        """
        try:
            return super().parse_path(cfg_path, *given, **options)
        except UnicodeDecodeError as error:
            raise UserError(f"{cfg_path}: is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error

    def parse_string(self, content: str, path: Any = "", *given: Any, **options: Any) -> Namespace:
        """The keys of a file, once they are known to have the right shape.

        Raises:
            UserError: a group that holds no keys, or a key that others decide, which jsonargparse would overwrite
                without a word (``_link_arguments.py``, ``apply_parsing_links``).
        """
        keys = read(content, str(path))
        if isinstance(keys, dict):
            if path:
                self._places |= {key: f"{path}:{line}" for key, line in key_lines(content).items()}
            links = [action for action in self._actions if isinstance(action, ActionLink)]
            _check_shape(keys, self.schema(), {link.dest: [key for key, _ in link.source] for link in links}, "")
        return super().parse_string(content, path, *given, **options)

    def schema(self) -> Node:
        """The JSON Schema of a file with keys of a run."""
        schema = schema_of(self, _changes())
        schema["properties"]["trainer"]["description"] = "How long to train and on what: keys of Lightning's Trainer"
        return schema

    def dump(self, namespace: Namespace, format: str = "parser_mode", **options: Any) -> str:
        """As ``--print_config`` prints it; in another format without comments.

        jsonargparse makes another parser of this type for the arguments of each class that a key names
        (``_typehints.py``, ``cached_get_class_parser``), which has no keys of a run.
        """
        if format != "parser_mode" or getattr(self, "_inner_parser", False):
            return super().dump(namespace, format, **options)
        keys = escaped(without_idle(json.loads(super().dump(namespace, "json", **options))))
        return commented({name: keys[name] for name in sorted(keys, key=_place)}, self.schema(), page)


def _no_word(value: str, node: Node) -> bool:
    """Whether a key takes words, and not this one; Lightning's own keys take any text until they are used."""
    words = list(map(str, choices(node)))
    return bool(words) and value not in words and "text" not in takes(node)


def _check_shape(keys: dict[str, Any], schema: Node, linked: dict[str, list[str]], group: str) -> None:
    """Groups hold keys, and no key that is ``linked`` to others, by which it is decided."""
    for name, value in keys.items():
        key, node = f"{group}{name}", schema["properties"].get(name, {})
        if not node and value == {}:  # which jsonargparse passes over
            groups = [name for name, node in schema["properties"].items() if "properties" in node]
            raise UserError(f"{key}: there is no such group of keys.{nearest(name, groups)} See {page(key)}.")
        if key in linked:
            raise UserError(f"{key}: {follows(linked[key], page)}")
        if "properties" not in node or isinstance(value, str):  # which names a file
            continue
        if value is None:
            raise UserError(f"{key}: holds nothing. Give keys below it, or leave it out.")
        if not isinstance(value, dict):
            raise UserError(f"{key}: is a group of keys, not {value!r:.80}. Give keys below it. See {page(key)}.")
        _check_shape(value, node, linked, f"{key}.")


def without_idle(keys: dict[str, Any]) -> dict[str, Any]:
    """Keys of a run without what is no part of it, and those of the Trainer that are as they must be here."""
    keys = {name: value for name, value in keys.items() if name != DRY_RUN}
    trainer = {name: value for name, value in keys.get("trainer", {}).items() if name not in ELSEWHERE}
    return {**keys, "trainer": trainer} if "trainer" in keys else keys


_ORDER = ("data", "model", "trainer", "evaluation", "checkpoint", "early_stopping", "parallel")


def _place(name: str) -> int:
    """Single keys first, then groups in the order in which one thinks of them."""
    return _ORDER.index(name) if name in _ORDER else -1


def _changes() -> dict[str, Node]:
    """What Lightning's own keys take and do here."""
    changes: dict[str, Node] = {
        f"trainer.{key}": {"const": default, "deprecated": True, "description": f"Has no effect here. Use {here}."}
        for key, (default, here) in ELSEWHERE.items()
    }
    logger, callback = {"$ref": "#/$defs/Logger"}, {"$ref": "#/$defs/Callback"}
    return changes | {
        "seed_everything": {
            "type": "integer",
            "description": "of the split, the shuffles, random weights and dropout.",
        },
        "trainer.strategy": {
            **STRATEGIES,
            "description": "how devices share the work: auto, ddp, fsdp, or a strategy of Lightning by its class_path.",
        },
        "trainer.accelerator": {
            "anyOf": [{"enum": list(ACCELERATORS)}, class_form("Accelerator")],
            "description": "kind of devices; auto takes what there is.",
        },
        "trainer.profiler": {
            "anyOf": [{"enum": list(PROFILERS)}, class_form("Profiler"), {"type": "null"}],
            "description": "what tells where the time goes: simple, advanced, pytorch, or one of your own.",
        },
        "trainer.max_time": {
            "anyOf": [
                {"type": "string", "title": "DD:HH:MM:SS in quotes"},
                {"type": "object", "additionalProperties": {"type": "integer"}, "title": "a mapping like {hours: 5}"},
                {"type": "null"},
            ],
            "description": "how long a run may take, DD:HH:MM:SS; it saves and ends then.",
        },
        "trainer.logger": {
            "anyOf": [{"type": ["boolean", "null"]}, logger, {"type": "array", "items": logger}],
            "description": "loggers of your own, beside TensorBoard's files and metrics.csv; false leaves all out.",
        },
        "trainer.callbacks": {
            "anyOf": [{"type": "null"}, {"type": "array", "items": callback}, callback],
            "description": "callbacks of your own, beside those of every run.",
        },
        "trainer.num_nodes": {"type": "integer", "description": "machines."},
        "trainer.precision": {
            "enum": [*WEIGHTS_DTYPE, 32, None],
            "description": "of weights and of matrix products. Default: 32-true.",
        },
        "trainer.max_epochs": {
            "type": ["integer", "null"],
            "description": "passes over the training data; a run ends at this or at max_steps, and needs one of them.",
        },
        "trainer.max_steps": {"type": "integer", "description": "optimizer steps of the run; -1 for no such limit."},
        "trainer.gradient_clip_val": {
            "type": ["number", "null"],
            "description": "largest norm of all gradients of a step; null clips nothing.",
        },
        "trainer.gradient_clip_algorithm": {"enum": ["norm", None], "description": "gradients are clipped by norm."},
        "trainer.enable_progress_bar": {
            "type": ["boolean", "null"],
            "description": "a bar, or plain lines. Default: a bar where the screen is a terminal.",
        },
    }
