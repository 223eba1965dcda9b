"""Configs and examples that come with the project, found from wherever the user stands."""

import os.path
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def expanded(path: str) -> Path:
    """A path with the home directory in the place of ``~``, or as it is where nobody has that name."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser raises


def shipped_config(name: str) -> str:
    """A bare config name that is not here (``lora.yaml``) is looked up among the shipped ``configs/``."""
    path = Path(name)
    if path.exists() or path.name != name:
        return name
    candidate = ROOT / "configs" / name
    return str(candidate) if candidate.is_file() else name


def shipped_example(path: str) -> str:
    """A path below ``examples/`` that is not here is looked up in the shipped ``examples/``; ``~`` is the home."""
    if path.startswith("~"):
        return str(expanded(path))
    exists = os.path.exists(path)  # noqa: PTH110  # Path.exists raises where a name is too long
    if exists or Path(path).parts[:1] != ("examples",):
        return path
    candidate = ROOT / path
    return str(candidate) if candidate.exists() else path
