"""Event files that a resumed run goes on from, as both of TensorBoard's readers see them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from mft_lightning.training.event_files import end_events


def points(directory: Path) -> dict[str, list[int]]:
    """The steps of each curve, as TensorBoard's own reader has them without any mark of a restart."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def write(directory: Path, steps: range, *, purge_step: int | None = None) -> None:
    with SummaryWriter(directory, purge_step=purge_step) as writer:
        for step in steps:
            writer.add_scalar("train", step, step)
            if step % 50 == 0:
                writer.add_scalar("val", step, step)
    time.sleep(0.01)


def test_what_comes_after_the_step_is_gone_whatever_comes_next(tmp_path: Path) -> None:
    write(tmp_path, range(0, 151, 10))
    end_events(tmp_path, 100)
    assert points(tmp_path) == {"train": list(range(0, 101, 10)), "val": [0, 50, 100]}
    write(tmp_path, range(110, 201, 10), purge_step=101)
    end_events(tmp_path, 170)
    assert points(tmp_path) == {"train": list(range(0, 171, 10)), "val": [0, 50, 100, 150]}


def test_points_at_numbers_of_a_user_s_own_take_no_others_with_them(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:
        for step in range(1, 9):
            writer.add_scalar("train", step, step)
            writer.add_scalar("tokens", step, 1000 * step)
    end_events(tmp_path, 6)
    assert points(tmp_path) == {"train": list(range(1, 7))}


@pytest.mark.parametrize(("step", "left"), [(100, 1), (110, 2), (10, 1), (0, 0)])
def test_a_file_without_a_point_that_stays_is_removed(tmp_path: Path, step: int, left: int) -> None:
    write(tmp_path, range(0, 101, 10))
    write(tmp_path, range(110, 201, 10), purge_step=101)
    end_events(tmp_path, step)
    assert len(list(tmp_path.iterdir())) == left


def test_an_event_that_a_kill_left_unfinished_goes_and_the_rest_stays_to_the_byte(tmp_path: Path) -> None:
    write(tmp_path, range(0, 101, 10))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for tail in (whole[-30:-7], b"\xff" * 40, b"\x05", bytes(500)):
        file.write_bytes(whole + tail)
        end_events(tmp_path, 1000)
        assert file.read_bytes() == whole
    file.write_bytes(whole[:-5])
    end_events(tmp_path, 1000)
    assert whole.startswith(file.read_bytes()) and points(tmp_path)["train"] == list(range(0, 101, 10))
    assert points(tmp_path)["val"] == [0, 50]


def test_other_files_and_missing_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    end_events(tmp_path, 0)
    end_events(tmp_path / "gone", 5)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
