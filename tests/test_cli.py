"""What a command imports decides when it says its first word; so that is tested, and no time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import runpy, sys
before = set(sys.modules)
try:
    runpy.run_module("mft_lightning", run_name="__main__")
except SystemExit as end:
    print(f"\\n{end.code or 0}")
print(*set(sys.modules) - before)
"""
OPTIONAL = {"peft", "bitsandbytes", "deepspeed"}  # what a run that trains all weights does without


def printed(script: str, *words: str) -> list[str]:
    """The lines that a Python of its own prints."""
    run = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in run.stderr, run.stderr
    return run.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "code"),
    [([], 0), (["--help"], 0), (["-h"], 0), (["--version"], 0), (["fitt"], 1)],
    ids=lambda given: "_".join(given) or "nothing" if isinstance(given, list) else str(given),
)
def test_what_needs_no_library_imports_python_s_own_alone(words: list[str], code: int) -> None:
    *_, ended, imported = printed(RUN, *words)
    tops = {name.partition(".")[0] for name in imported.split()}
    assert ended == str(code) and "mft_lightning" in tops
    assert tops - set(sys.stdlib_module_names) - {"mft_lightning"} == set()


def test_fit_without_adapters_does_without_what_it_does_not_need() -> None:
    script = "import sys, mft_lightning.commands.fit; print(*sys.modules)"
    imported = set(printed(script)[-1].split())
    assert {"mft_lightning.commands.fit", "lightning"} <= imported
    assert OPTIONAL & imported == set()
