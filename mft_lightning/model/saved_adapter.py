"""What a saved adapter says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mft_lightning.errors import UserError, first_line


def is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


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
