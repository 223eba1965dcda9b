"""Configs and examples that come with the project, found from wherever the user stands."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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
        return str(Path(path).expanduser())
    if Path(path).exists() or Path(path).parts[:1] != ("examples",):
        return path
    candidate = ROOT / path
    return str(candidate) if candidate.exists() else path
