"""Environment variables in YAML."""

from __future__ import annotations

import pytest

from mft_lightning.errors import UserError
from mft_lightning.variables import read

TEXT = """
data:
  data_paths: ["${DATA}/a", "${DATA}/${NAME:-b}"]
  cache_dir: ${CACHE:-/tmp/${x}
  eos_token: $${DATA}
  seq_length: ${LENGTH:-512}
  "${DATA}": 5
"""


def test_what_variables_hold_stands_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/corpus")
    monkeypatch.setenv("NAME", "")
    assert read(TEXT, "run.yaml") == {
        "data": {
            "data_paths": ["/corpus/a", "/corpus/b"],
            "cache_dir": "/tmp/${x",
            "eos_token": "${DATA}",
            "seq_length": "512",
            "${DATA}": 5,  # keys stay as they are
        }
    }
    assert read("${DATA}") == "${DATA}"  # a value of the command line, where the shell puts variables in


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: {b: 5}\nc: ['x', '${GONE}/y']",
            r"^c \(run.yaml\): the environment variable GONE is not set. Set it, as in",
        ),
        ("c: ${EMPTY}", r"the environment variable EMPTY is set to nothing"),
        ("a:\n  b: ${oc.env:HOME}/x", r"^a.b \(run.yaml\): '\$\{oc.env:HOME\}/x' names no variable. Write \$\{NAME\}"),
        ("a:\n  b: [${GONE}/y]", r"^run.yaml:2: is not valid YAML \(.*\). Put a value with \$\{...\} in quotes"),
        ("a: b: c", r"^run.yaml:1: is not valid YAML \([^)]*\)\.$"),
        ("", r"^run.yaml: holds no keys"),
        ("- a", r"^run.yaml: holds no keys"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("GONE", raising=False)
    with pytest.raises(UserError, match=message):
        read(text, "run.yaml")
