"""Classes by their paths: those that go by their bare names too, and the one that a wrong path means."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from types import ModuleType

# kinds of classes that keys take -> where the kind is, and those of it that go by their bare names
HOMES = {
    "Callback": "lightning.pytorch.callbacks",
    "Logger": "lightning.pytorch.loggers",
    "Strategy": "lightning.pytorch.strategies",
    "Profiler": "lightning.pytorch.profilers",
    "Accelerator": "lightning.pytorch.accelerators",
    "Optimizer": "torch.optim",
    "Balancer": "mft_lightning.weighting.balancer",
}


def names_of(kind: str) -> list[str]:
    """The classes of a kind that go by their bare names; none of a kind that has no such."""
    return _classes(importlib.import_module(HOMES[kind]), kind) if kind in HOMES else []


def class_at(path: str) -> type | None:
    """The class at a path; None where there is none."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None) if module else None
    except ImportError:
        return None
    return found if isinstance(found, type) else None


def nearest_path(path: str, kind: str) -> str | None:
    """The path of a class of a kind that is spelt most like one where no class is; None where none is near.

    It is looked for in the module that the path names, then where those of the kind are, then in modules that are
    spelt like it, as far as they are imported or belong to one that is.
    """
    place, _, name = path.rpartition(".")
    for module in (sys.modules.get(place), sys.modules.get(HOMES.get(kind, "")), _nearest_module(place)):
        if module is not None and (near := _nearest(name, _classes(module, kind))):
            return f"{module.__name__}.{near}"
    return None


def _nearest_module(path: str) -> ModuleType | None:
    first, *rest = path.split(".")
    module = sys.modules.get(_nearest(first, [name for name in sys.modules if name.isidentifier()]) or "")
    for part in rest:
        found = [found.name for found in pkgutil.iter_modules(getattr(module, "__path__", ()))]
        name = _nearest(part, found)
        if module is None or name is None:
            return None
        module = importlib.import_module(f"{module.__name__}.{name}")
    return module


def _classes(module: ModuleType, kind: str) -> list[str]:
    """The names that a module has for classes of a kind, but for the kind itself."""
    base = getattr(importlib.import_module(HOMES[kind]), kind) if kind in HOMES else object
    found = {name: value for name, value in vars(module).items() if isinstance(value, type) and name[0] != "_"}
    return sorted(name for name, value in found.items() if issubclass(value, base) and value is not base)


def _nearest(word: str, known: list[str]) -> str | None:
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return near[0] if near else None
