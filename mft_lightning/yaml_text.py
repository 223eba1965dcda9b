"""YAML that the parser of a run reads back as it was, and comments in it."""

from __future__ import annotations

import re
import textwrap

import yaml

WIDTH = 110  # of comments


class _Dumper(yaml.SafeDumper):
    """Quotes what PyYAML takes for text and the parser for a number: YAML 1.2 needs no point in one, as in 1e3."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9._]+[eE][-+]?[0-9]+"), list("-+.0123456789")
)


def as_yaml(keys: dict[str, object]) -> str:
    """Nested keys and their values as text, in their order."""
    return yaml.dump(keys, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def comment_lines(text: str, begin: str = "# ") -> list[str]:
    """The lines of a comment, each of which begins so; what YAML takes for a line's end is a blank in it."""
    return textwrap.wrap(
        " ".join(text.split()),
        WIDTH,
        initial_indent=begin,
        subsequent_indent=begin,
        break_long_words=False,
        break_on_hyphens=False,
    )
