"""Task directories by their paths and names."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mft_lightning.data.sampling import parse_task_sampling
from mft_lightning.data.tasks import (
    find_tasks,
    find_validation_tasks,
    parse_paths,
    parse_task_weights,
)
from mft_lightning.errors import UserError

# --- paths


@pytest.mark.parametrize(
    ("given_paths", "expected"),
    [
        (["a", "dir/b"], ["a", "dir/b"]),
        (("a",), ["a"]),
        (["with, comma", "[odd]"], ["with, comma", "[odd]"]),
        ("[a,dir/b]", ["a", "dir/b"]),
        (" [ a , dir/b ] ", ["a", "dir/b"]),
        ("a,b", ["a", "b"]),
        ("a", ["a"]),
        ("['a', \"b\"]", ["a", "b"]),
    ],
)
def test_paths_are_a_list_or_the_originals_string(given_paths: list[str] | str, expected: list[str]) -> None:
    assert parse_paths(given_paths, "data.data_paths") == expected


@pytest.mark.parametrize("nothing", ["", "  ", "[]", "[a,,b]", "[a,]", [], [""], ["a", ""]])
def test_an_empty_path_is_an_error_that_names_the_key(nothing: list[str] | str) -> None:
    with pytest.raises(UserError, match=r"^data\.valid_data_paths: .*names no directory"):
        parse_paths(nothing, "data.valid_data_paths")


# --- names


def test_a_task_is_named_by_the_last_part_of_its_path() -> None:
    tasks = find_tasks(["data/code", "data/math/", "other/../data/Übung 1.0+b-c_d"])
    assert [task.name for task in tasks] == ["code", "math", "Übung 1.0+b-c_d"]
    assert [str(task.directory) for task in tasks[:2]] == ["data/code", "data/math"]


def test_a_relative_dot_is_named_by_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math").mkdir()
    monkeypatch.chdir(tmp_path / "math")
    assert [task.name for task in find_tasks(".")] == ["math"]


def test_a_shipped_example_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_tasks("examples/quickstart/unit_tests")[0].directory.is_dir()


@pytest.mark.parametrize("paths", ["[a/code,b/code]", ["a/code", "a/code/"], ["a/code", "a/b/../code"]])
def test_two_directories_with_one_name_are_an_error_that_names_both(paths: list[str] | str) -> None:
    with pytest.raises(UserError, match=r"^data\.data_paths: a/code and .* both name the task 'code'"):
        find_tasks(paths)


@pytest.mark.parametrize("paths", [["a/Math", "b/math"], ["STRASSE", "straße"]])
def test_names_that_a_file_system_may_take_for_one_are_an_error_that_names_both(paths: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        find_tasks(paths)
    assert f"{paths[0]} and {paths[1]} both name the task" in str(caught.value)
    assert "but for capitals" in str(caught.value)
    assert [task.name for task in find_tasks(["Math", "physics"])] == ["Math", "physics"]


@pytest.mark.parametrize("end", ["", "s", " 2"])
@pytest.mark.parametrize(
    ("one", "other", "but"),
    [
        ("caf\u00e9", "cafe\u0301", ", but for how its accents"),
        ("cafe\u0301", "caf\u00e9", ", but for how its accents"),
        ("CAF\u00c9", "cafe\u0301", ", but for capitals and how its accents"),
        ("CAFE\u0301", "cafe\u0301", ", but for capitals. Rename"),
        ("\u1112\u1161\u11ab", "\ud55c", ", but for how its accents"),
    ],
)
def test_names_that_differ_in_normalisation_alone_are_an_error(one: str, other: str, but: str, end: str) -> None:
    with pytest.raises(UserError) as caught:
        find_tasks([f"a/{one}{end}", f"b/{other}{end}"])
    assert f"a/{one}{end} and b/{other}{end} both name the task" in str(caught.value)
    assert but in str(caught.value)


@pytest.mark.parametrize("name", ["हिन्दी", "cafe\u0301", "e\u0323\u0301-2", "தமிழ் 1", "ภาษาไทย", "עִבְרִית"])
def test_a_name_may_have_combining_marks_on_its_letters(name: str) -> None:
    assert [task.name for task in find_tasks([f"data/{name}"])] == [name]


@pytest.mark.parametrize("bad", ["\u0301a", "a \u0301", "1\u0301", "a_\u0301", "a\u20dd"])
def test_a_combining_mark_on_no_letter_is_an_error(bad: str) -> None:
    with pytest.raises(UserError, match=r"^data\.data_paths: .*is no good task name"):
        find_tasks([bad])


@pytest.mark.parametrize("bad", ["a/-x", "a/.x", "a/x:y", "a/x#y", "/", "a/x\n", "a/x*", "a/x\0", "a/\udcff"])
def test_a_name_that_cannot_stand_in_a_tag_is_an_error(bad: str) -> None:
    with pytest.raises(UserError, match=r"^data\.data_paths: .*is no good task name"):
        find_tasks([bad])


def test_a_linked_directory_s_task_has_the_name_it_is_given_by(tmp_path: Path) -> None:
    for name in ("alpha", "beta"):
        (tmp_path / f"{name}-1").mkdir()
        (tmp_path / name).symlink_to(tmp_path / f"{name}-1")
    found = find_tasks([str(tmp_path / "alpha"), str(tmp_path / "beta") + "/"])
    assert [task.name for task in found] == ["alpha", "beta"]


def test_one_directory_by_two_names_is_an_error_that_names_both(tmp_path: Path) -> None:
    (tmp_path / "alpha").mkdir()
    (tmp_path / "beta").symlink_to(tmp_path / "alpha")
    with pytest.raises(UserError, match=r"^data\.data_paths: the tasks 'beta' and 'alpha' are one directory, .*alpha"):
        find_tasks([str(tmp_path / "beta"), str(tmp_path / "alpha")])


def test_names_that_yaml_reads_as_numbers_are_names() -> None:
    assert parse_task_weights({2024: 1.0, "2025": 3.0}, ["2024", "2025"]) == [0.5, 1.5]  # type: ignore[dict-item]


def test_two_values_for_one_task_are_an_error() -> None:
    for parse in (parse_task_weights, parse_task_sampling):
        with pytest.raises(UserError, match="gives a task two values"):
            parse({2024: 1, "2024": 7, "b": 2}, ["2024", "b"])  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {False: 1, "2024-01-01": 2, 1e3: 1},
            " (missing: 'no', '1e3'; unknown: False, 1000.0). YAML reads names as False, 1000.0. Put them in quotes.",
        ),
        (
            {None: 1, "no": 1, "2024-01-01": 1, "1e3": 1},
            " (unknown: None). YAML reads a name as None. Put it in quotes.",
        ),
        ({"no": 1, "1e3": 1}, " (missing: '2024-01-01')."),
        ({"2024-01": 1}, " (missing: 'no', '2024-01-01', '1e3'; unknown: '2024-01'). The nearest is 2024-01-01."),
    ],
)
def test_names_without_a_value_and_names_of_no_task_are_told_as_they_were_read(
    values: dict[object, float], told: str
) -> None:
    names = ["no", "2024-01-01", "1e3"]
    with pytest.raises(UserError) as caught:
        parse_task_weights(values, names)  # type: ignore[arg-type]
    assert str(caught.value) == f"data.task_weights: give one weight for each of no, 2024-01-01, 1e3{told}"
    with pytest.raises(UserError) as caught:
        parse_task_sampling(values, names)
    told = f", or {{temperature: T}} alone{told}"
    assert str(caught.value) == f"data.task_sampling: give one rate for each of no, 2024-01-01, 1e3{told}"


def test_a_validation_directory_that_is_trained_on_is_refused(write_task: Callable[..., str], tmp_path: Path) -> None:
    task = write_task("one", [{"prompt": "a", "answer": "b"}])
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "one").symlink_to(task)
    tasks = find_tasks([task])
    for path in (task, str(tmp_path / "link" / "one")):
        with pytest.raises(UserError, match="is trained on too"):
            find_validation_tasks([path], tasks)
