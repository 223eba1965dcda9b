"""Configs and examples that come with the project, found from wherever the user stands."""

import os
from pathlib import Path

CONFIGS, EXAMPLES = "configs", "examples"
_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE if (_PACKAGE / CONFIGS).is_dir() else _PACKAGE.parent  # a wheel has them inside of the package


def expanded(path: str) -> Path:
    """A path with the home directory in the place of ``~``, or as it is where nobody has that name."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser raises


def shipped_config(name: str) -> str:
    """A bare name (``lora.yaml``) or a path below ``configs/`` that is not here is looked up in the shipped ones."""
    path = Path(name)
    if path.exists() or path.parts not in ((path.name,), (CONFIGS, path.name)):
        return name
    candidate = ROOT / CONFIGS / path.name
    return str(candidate) if candidate.is_file() else name


def shipped_example(path: str | Path) -> str:
    """A path below ``examples/`` that is not here is looked up in the shipped ``examples/``; ``~`` is the home."""
    path = os.fspath(path)  # Python's users have Path objects at hand
    if path.startswith("~"):
        return str(expanded(path))
    exists = os.path.exists(path)  # noqa: PTH110  # Path.exists raises where a name is too long
    if exists or Path(path).parts[:1] != (EXAMPLES,):
        return path
    candidate = ROOT / path
    return str(candidate) if candidate.exists() else path
