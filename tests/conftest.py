"""Small models and task directories that every test can use, and the real ones where they are at hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import lightning.pytorch.cli  # noqa: F401  # so that its loggers are there to be quietened
import pytest
import torch

from mft_lightning.quiet import quieten

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DROPPING = {"hidden_dropout": 0.1, "attention_dropout": 0.1}

torch.set_num_threads(1)  # two cores, and tests may run side by side
quieten()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let two workers end at about the same time.

    Each gets half of the list, and takes over the later part of what the other has left. So each half begins with
    files of long tests, which stay together for what they share, and ends with short tests.
    """
    long: dict[Path, list[pytest.Item]] = {}
    short = []
    for item in items:
        here = item.path.parent.name in ("examples", "integration")
        (long.setdefault(item.path, []) if here else short).append(item)
    first, second = (list(chain(*list(long.values())[start::2])) for start in (0, 1))
    begun = max(0, len(items) // 2 - len(first))
    items[:] = [*first, *short[:begun], *second, *short[begun:]]


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Token caches of all tests of a process lie here, not in the cache of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX directory without weights: two narrow layers under the examples' tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    shutil.copytree(ROOT / "examples" / "model", directory, dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text()) | TINY
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def pythia() -> Path:
    """The real GPT-NeoX tokenizer with Pythia-70m's configuration, without weights."""
    directory = SHARED / "models" / "pythia-70m-config"
    if not directory.is_dir():
        pytest.skip("the real GPT-NeoX tokenizer is not beside this checkout (../shared/models)")
    return directory


@pytest.fixture(scope="session")
def real_tasks() -> list[str]:
    """The real three-task corpus."""
    directory = SHARED / "data" / "real"
    if not directory.is_dir():
        pytest.skip("the real corpus is not beside this checkout (../shared/data/real)")
    return [str(directory / name) for name in ("text_to_code", "code_completion", "grade_school_math")]


@pytest.fixture(scope="session")
def example_tasks() -> list[str]:
    return [str(ROOT / "examples" / "quickstart" / name) for name in ("text_to_code", "code_explanation", "unit_tests")]


@pytest.fixture
def write_task(tmp_path: Path) -> Callable[..., str]:
    """Write a task directory: ``write_task("name", [record, ...])``; a record is an object or a raw line."""

    def write(name: str, records: list[object], file: str = "part.jsonl") -> str:
        directory = tmp_path / "tasks" / name
        directory.mkdir(parents=True, exist_ok=True)
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (directory / file).write_text("\n".join(lines) + "\n")
        return str(directory)

    return write
