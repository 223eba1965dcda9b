"""Environment variables in YAML."""

from __future__ import annotations

import json

import pytest

from mft_lightning.errors import UserError
from mft_lightning.variables import escaped, read

TEXT = """
data:
  data_paths: ["${DATA}/a", "${DATA}/${NAME:-b}"]
  cache_dir: ${CACHE:-${DATA}/$x}
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
            "cache_dir": "/corpus/$x",  # of a default too
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
            r"^c \(run.yaml:2\): the environment variable GONE is not set. Set it, as in",
        ),
        ("a:\n- b\n- {c: '${GONE}'}", r"^a.c \(run.yaml:1\): the environment variable GONE"),  # of the list
        ("c: ${EMPTY}", r"the environment variable EMPTY is set to nothing"),
        (
            "a:\n  b: ${oc.env:HOME}/x",
            r"^a.b \(run.yaml:2\): '\$\{oc.env:HOME\}/x' names no variable. Write \$\{NAME\}",
        ),
        ("a: ${GONE:-${GONE}/x}", r"^a \(run.yaml:1\): the environment variable GONE is not set"),
        ("a: ${GONE:-/tmp/${x}", r"^a \(run.yaml:1\): .* names no variable"),
        ("a:\n  b: [${GONE}/y]", r"^run.yaml:2: is not valid YAML \(.*\). Put a value with \$\{...\} in quotes"),
        ("a: b: c", r"^run.yaml:1: is not valid YAML \([^)]*\)\.$"),
        ("a:\n  b: [c,\n", r"^run.yaml:3: is not valid YAML"),
        ("", r"^run.yaml: holds no keys"),
        ("- a", r"^run.yaml: holds no keys"),
        ("a: {b: 1}\nc: 1\na: {d: 1}", r"^a \(run.yaml:3\): stands twice, in line 1 too"),
        ("a:\n- b: 1\n- {b: 2,\n   b: 3}", r"^a.b \(run.yaml:4\): stands twice, in line 3 too"),
        ("a: {5: b}", r"^a \(run.yaml:1\): YAML reads a name as 5. Put it in quotes."),
        ("5: b", r"^the first level \(run.yaml\): YAML reads a name as 5. Put it in quotes."),
        ("a: &a\n  b: *a", r"^a.b \(run.yaml\): holds itself"),
        ("a: " + "[" * 5000 + "]" * 5000, r"^run.yaml: is nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("GONE", raising=False)
    with pytest.raises(UserError, match=message):
        read(text, "run.yaml")


def test_what_is_escaped_is_read_as_it_was() -> None:
    value = {"a": ["${B}", {"c": "$${D}"}], "e": 5}
    assert read(json.dumps(escaped(value)), "run.yaml") == value
