"""Titles of panels fit, and tell tasks apart whatever their names have in common."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_lightning.commands.panel_names import panel_names

PARTS = st.sampled_from(["a", "b", "…", " ", "_", "x" * 12, "same words ", "y_" * 10, "(2)", "7", "é"])
NAMES = st.lists(st.lists(PARTS, max_size=8).map("".join), max_size=40, unique=True)


@given(names=NAMES, limit=st.integers(19, 70))
@settings(deadline=None, max_examples=400)
def test_titles_fit_and_are_different_whenever_the_names_are(names: list[str], limit: int) -> None:
    titles = panel_names(names, limit)
    assert len(set(titles)) == len(titles) == len(names)
    assert all(len(title) <= limit for title in titles)


@given(names=NAMES)
def test_names_that_fit_stay_as_they_are(names: list[str]) -> None:
    limit = max(map(len, names), default=0)
    assert panel_names(names, limit) == names


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (["maths_for_the_youngest_pupils"], ["maths_for…st_pupils"]),
        (
            [f"task number {i} with a long name" for i in (0, 1, 10)],
            ["task number 0 with…", "task number 1 with…", "task number 10 wit…"],
        ),
        (
            [f"a beginning of many words, then {i} of the name" for i in "XY"],
            ["…then X of the name", "…then Y of the name"],
        ),
        (
            [f"instructions_{lang}_of_some_level_{level}_for_tests" for lang in ("c", "go") for level in (1, 2)],
            ["…c_…1_…", "…c_…2_…", "…go_…1_…", "…go_…2_…"],
        ),
        ([f"{'x' * 30}{i}{'y' * 30}" for i in "ab"], ["…xxxxxxxxayyyyyyyy…", "…xxxxxxxxbyyyyyyyy…"]),
        (
            [f"{'x' * 30}{one}{'y' * 30}{other}{'z' * 30}" for one in "ab" for other in "cd"],
            ["xxxxxxx…zzzzzzz (1)", "xxxxxxx…zzzzzzz (2)", "xxxxxxx…zzzzzzz (3)", "xxxxxxx…zzzzzzz (4)"],
        ),
        (["a" * 9 + "…" + "b" * 9, "a" * 12 + "b" * 12], ["a" * 9 + "…" + "b" * 9, "a" * 12 + "b" * 6 + "…"]),
        (["same", "same"], ["same (1)", "same (2)"]),
    ],
)
def test_what_is_shown_is_what_differs(names: list[str], titles: list[str]) -> None:
    assert panel_names(names, 19) == titles
