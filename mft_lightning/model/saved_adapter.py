"""What a saved adapter says of itself."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from mft_lightning.errors import UserError, first_line

TASK_TYPES = {"ANT_CAUSAL_LM": "CAUSAL_LM"}  # a name that the original gave to peft, which does not know it


def is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


def peft_config(directory: Path) -> Any:
    """The configuration of a saved adapter, as ``PeftConfig.from_pretrained`` reads it, of the original's adapters too.

    Raises:
        OSError, ValueError, TypeError, LookupError: there is none, or it is damaged.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig  # here for the start-up time of what needs no adapter

    written = dict(PeftConfig.from_json_file(str(directory / "adapter_config.json")))
    kind = written.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"peft_type: {kind!r} is no kind of adapter that peft knows")
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    # peft warns of fields that it does not know; those of its first versions, like enable_lora: null, ask for nothing
    written = {name: value for name, value in written.items() if name in known or value}
    written["task_type"] = TASK_TYPES.get(str(written.get("task_type")), written.get("task_type"))
    return PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**written))


def adapter_base(directory: Path) -> object:
    """The base model that a saved adapter names, if it names one.

    Raises:
        UserError: its configuration is damaged.
    """
    return _saved_config(directory).get("base_model_name_or_path")


def saved_whole(directory: Path) -> list[str]:
    """The modules that a saved adapter holds whole, as it names them.

    Raises:
        UserError: its configuration is damaged.
    """
    return list(_saved_config(directory).get("modules_to_save") or [])


def _saved_config(directory: Path) -> dict[str, Any]:
    file = directory / "adapter_config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)}).") from error
