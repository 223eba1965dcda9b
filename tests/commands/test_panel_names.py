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
        ([f"task number {i} with a long name" for i in (0, 1, 10)], ["…0…", "…1…", "…10…"]),
        (
            [f"a beginning of many words, then {i} of the name" for i in ("X", "some of the Y")],
            ["…X…", "…some of the Y…"],
        ),
        (
            [f"instructions_{lang}_of_some_level_{level}_for_tests" for lang in ("c", "go") for level in (1, 2)],
            ["…c_of_some_level_1…", "…c_of_some_level_2…", "…go_of_so…_level_1…", "…go_of_so…_level_2…"],
        ),
        (
            ["b", *(f"a{'x' * 20}{one}{'y' * 20}" for one in "ab")],
            ["1 b", "2 axxxxxxx…yyyyyyyy", "3 axxxxxxx…yyyyyyyy"],
        ),
    ],
)
def test_what_is_shown_is_what_differs(names: list[str], titles: list[str]) -> None:
    assert panel_names(names, 19) == titles
