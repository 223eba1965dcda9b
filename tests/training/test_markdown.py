"""Text of data and models in Markdown, as TensorBoard turns it into a page."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.plugin_util import markdown_to_safe_html

from mft_lightning.training.markdown import fenced, plain, table

SPOILING = [
    "```",
    "````python\nprint(1)\n````",
    "~~~\nx\n~~~",
    "a\n```\n# title",
    "<script>x</script>",
    "</code></pre>",
    "`",
]


def shown(markdown: str) -> str:
    return markdown_to_safe_html(markdown)


def code(page: str) -> list[str]:
    """The text of each block of code."""
    return [html.unescape(found) for found in re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)]


@pytest.mark.parametrize("text", SPOILING, ids=repr)
def test_a_fence_holds_whatever_is_in_it(text: str) -> None:
    page = shown(f"{fenced(text)}\n\nafter\n\n{fenced('next')}")
    assert code(page) == [f"{text}\n", "next\n"] and "<p>after</p>" in page
    assert "<h1" not in page and "<script" not in page


@given(st.text(st.sampled_from("`~ \n#*a<|&"), max_size=40))
def test_a_fence_holds_any_mix(text: str) -> None:
    lines = [line if line.strip() else "" for line in text.split("\n")]  # of blank lines Markdown drops the spaces
    (block, after) = code(shown(f"{fenced(text)}\n\n{fenced('next')}"))
    assert after == "next\n" and [line if line.strip() else "" for line in block[:-1].split("\n")] == lines


@pytest.mark.parametrize(
    "text", ["a|b", "*a*", "_a_b_", "<b>x</b>", "[a](b)", "`a`", "# a", "a\\|b", "&lt;", "ü ✓", "- a", "1. a", "=="]
)
def test_a_cell_and_a_line_are_their_text(text: str) -> None:
    page = shown(table(["task", text], [[text, "1"]]))
    cells = [html.unescape(found) for found in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", page)]
    assert cells == ["task", text, text, "1"]
    assert re.fullmatch(r"<p>(.*)</p>", shown(plain(text))) is not None
    assert html.unescape(shown(plain(text)).removeprefix("<p>").removesuffix("</p>")) == text
