"""What a key takes, said in place of a value that it does not take."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

from mft_lightning.class_paths import names_of
from mft_lightning.errors import nearest
from mft_lightning.schema import Node, allowed, choices, classes

Documented = Callable[[str], str]  # a key -> where it is documented

# words of other programs, or of other versions -> the word or class that says it here
_OTHER_WORDS = {
    **dict.fromkeys(("bf16", "bfloat16"), "bf16-mixed"),
    **dict.fromkeys(("16", "fp16", "float16"), "16-mixed"),
    **dict.fromkeys(("fp32", "float32"), "32-true"),
    **dict.fromkeys(("64", "fp64", "float64"), "64-true"),
    **dict.fromkeys(("ddp_find_unused_parameters_true", "ddp_spawn", "ddp_notebook", "dp"), "ddp"),
    **dict.fromkeys(("deepspeed", "deepspeed_stage_2", "deepspeed_stage_3"), "DeepSpeedStrategy"),
    "wandb": "WandbLogger",
    "mlflow": "MLFlowLogger",
    "csv": "CSVLogger",
}
_VALUE = re.compile(r"(?:Given|Got) value: (.*)$", re.MULTILINE)


def missing(key: str, documented: Documented) -> str:
    """That a key without a default is not given."""
    return f"{key}: is missing. Give it in a --config file or on the command line. See {documented(key)}."


def refusal(key: str, value: Any, node: Node, documented: Documented) -> str:
    """That a key does not take a value, what it takes, and the nearest word or class of that."""
    if value is None and "default" not in node:
        return missing(key, documented)
    shown = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    taken = f"{key}: {shown if len(shown) <= 80 else f'{shown[:77]}...'} is refused; it takes {allowed(node)}."
    if value is None:
        taken += f" Leave it out for its default, {node['default']}."
    known = [*map(str, choices(node)), *(name for kind in classes(node) for name in names_of(kind))]
    return f"{taken}{_nearest(key, str(value), known)} See {documented(key)}."


def _nearest(key: str, word: str, known: list[str]) -> str:
    """The word or class that is meant, or is spelt most alike, in a sentence; empty where none is."""
    meant, name = _OTHER_WORDS.get(word), word.rpartition(".")[2]
    if meant in known:
        return f" Here it is {meant}."
    return f" Write it as {key}.class_path." if name in known else nearest(name, known)


def given(why: str) -> Any:
    """The refused value as a message of jsonargparse's has it: text, or what Python's syntax makes of it."""
    written = (_VALUE.findall(why) or [""])[-1].strip()  # the first ones may be of parts of it
    nested = re.fullmatch(r"NestedArg\(key='(\w+)', val=(.*)\)", written, re.DOTALL)
    written = re.sub(r"\bNamespace\(class_path=('[\w.]+')\)", r"\1", nested[2] if nested else written)
    try:
        return ast.literal_eval(written)
    except (ValueError, SyntaxError):
        return written
