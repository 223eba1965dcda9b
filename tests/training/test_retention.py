"""What stays of a run's checkpoints, whenever the process ends."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from mft_lightning.aside import written_aside
from mft_lightning.errors import UserError
from mft_lightning.training.checkpoint_choice import find_checkpoints, resolve_checkpoint
from mft_lightning.training.checkpoint_dirs import FORMAT_VERSION, directory_name, verify, write_metadata
from mft_lightning.training.retention import Retention
from tests.crashes import ended_before_change

LOSSES = {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.5}


def retention(output_dir: Path, limit: int | None = 2, **options: str) -> Retention:
    return Retention(output_dir, limit, "val/loss", "min", **options)


def save(output_dir: Path, step: int, **options: str) -> None:
    """What a save does, but for the model."""
    with written_aside(output_dir / directory_name(step)) as aside:
        aside.mkdir()
        for name in ("model.safetensors", "trainer.pt"):
            (aside / name).write_text(f"{name} of step {step}")
        metadata = {"format": FORMAT_VERSION, "step": step, "epoch_end": False, "metrics": {"val/loss": LOSSES[step]}}
        metadata |= {"fingerprint": {}, "chat_format": {}, "processes": 1}
        write_metadata(aside, metadata)
    retention(output_dir, **options).apply()


def contents(output_dir: Path) -> list[str]:
    """Everything in a directory, hidden or not, and where links point."""
    found = [path for path in output_dir.rglob("*") if path.is_symlink() or path.is_file()]
    return sorted(f"{path.relative_to(output_dir)} {path.readlink() if path.is_symlink() else ''}" for path in found)


def links(output_dir: Path) -> dict[str, str]:
    return {name: str((output_dir / name).readlink()) for name in ("last", "best")}


def assert_whole(output_dir: Path) -> None:
    """Every checkpoint that is there is whole, the links lead to one, and a run can go on."""
    for info in find_checkpoints(output_dir):
        verify(info.path)
    for name in ("last", "best"):
        verify(output_dir / name)
    last = resolve_checkpoint("last", output_dir, "val/loss", "min", to_resume=True)
    assert last is not None and last.step in (30, 40)


@pytest.mark.parametrize("trainer_state", ["all", "latest"])
def test_a_kill_at_any_instant_of_a_save_leaves_whole_checkpoints_and_no_remains(
    tmp_path: Path, trainer_state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saving the fourth removes the third; the second is the best. The next start and save end as if nothing was."""
    for step in LOSSES:
        save(tmp_path / "whole", step, trainer_state=trainer_state)
    for number in count():
        output_dir = tmp_path / str(number)
        for step in (10, 20, 30):
            save(output_dir, step, trainer_state=trainer_state)
        cut = ended_before_change(number, lambda to=output_dir: save(to, 40, trainer_state=trainer_state))
        assert_whole(output_dir)
        assert "Passed over" not in capsys.readouterr().out
        last = resolve_checkpoint("last", output_dir, "val/loss", "min", to_resume=True)
        if last.step == 30:
            retention(output_dir, trainer_state=trainer_state).begin(last.step)
            assert not list(output_dir.rglob("*.unfinished"))
            save(output_dir, 40, trainer_state=trainer_state)
        else:
            retention(output_dir, trainer_state=trainer_state).settle()
        assert contents(output_dir) == contents(tmp_path / "whole")
        if not cut:
            break
    assert number > 10


def test_links_follow_the_latest_and_the_best(tmp_path: Path) -> None:
    for step, best in ((10, 10), (20, 20), (30, 20)):
        save(tmp_path, step)
        assert links(tmp_path) == {"last": directory_name(step), "best": directory_name(best)}


def test_a_start_moves_later_checkpoints_aside_and_the_links_back(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, limit=None)
    (tmp_path / directory_name(30) / "trainer.pt").unlink()  # damaged or not
    retention(tmp_path).begin(10)
    assert [info.step for info in find_checkpoints(tmp_path)] == [10]
    assert [info.step for info in find_checkpoints(tmp_path / "superseded")] == [20]
    assert links(tmp_path) == {"last": directory_name(10), "best": directory_name(10)}


def test_only_the_latest_resumes_where_only_its_state_is_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, limit=None, trainer_state="latest")
    assert [info.resumable for info in find_checkpoints(tmp_path)] == [False, False, True]
    assert [path.parent.name for path in tmp_path.rglob("trainer.pt")] == [directory_name(30)]
    assert resolve_checkpoint("best", tmp_path, "val/loss", "min").step == 20
    with pytest.raises(UserError, match="its trainer state was dropped"):
        resolve_checkpoint("best", tmp_path, "val/loss", "min", to_resume=True)


def test_last_passes_over_what_is_damaged_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in LOSSES:
        save(tmp_path, step, limit=None)
    newest, before = tmp_path / directory_name(40), tmp_path / directory_name(30)
    (newest / "model.safetensors").write_text("cut")
    (before / "trainer.pt").write_text("trainer.pt of step 31")  # as many bytes
    assert resolve_checkpoint("last", tmp_path, "val/loss", "min").step == 20
    said = capsys.readouterr().out
    assert "step-00000040: is damaged: model.safetensors has 3 bytes of 28. Passed over for step-00000020." in said
    assert "step-00000030: is damaged: trainer.pt is not as it was written (SHA-256). Passed over" in said
    for damaged in (newest, before):
        with pytest.raises(UserError, match=rf"{damaged.name}: is damaged"):
            resolve_checkpoint(str(damaged), tmp_path, "val/loss", "min")


def test_where_none_is_whole_all_are_named(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / directory_name(10) / "checkpoint.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole\.\n.*step-00000010: is no checkpoint"):
        resolve_checkpoint("last", tmp_path, "val/loss", "min")


@pytest.mark.parametrize(("old", "new"), [('"val/loss": 3.0', '"val/loss": 0.1'), ('"step": 10', '"step": 11')])
def test_a_description_that_was_edited_is_refused(tmp_path: Path, old: str, new: str) -> None:
    save(tmp_path, 10)
    file = tmp_path / directory_name(10) / "checkpoint.json"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError, match=r"checkpoint\.json: is damaged: it is not as it was written"):
        verify(file.parent)


def test_what_cannot_be_removed_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a network file system, where another program reads an old checkpoint."""
    for step in (10, 20):
        save(tmp_path, step)

    def busy(*given: object) -> None:
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patched:
        patched.setattr("mft_lightning.aside.shutil.rmtree", busy)
        save(tmp_path, 30)
    assert "step-00000010 could not be removed" in capsys.readouterr().out
    assert [info.step for info in find_checkpoints(tmp_path)] == [20, 30]
    save(tmp_path, 40)
    assert not list(tmp_path.glob(".*"))


def test_what_is_called_like_a_link_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "best").mkdir()
    save(tmp_path, 10)
    assert (tmp_path / "best").is_dir() and not (tmp_path / "best").is_symlink()
    assert "best is none of this run's" in capsys.readouterr().out


def test_where_links_cannot_be_made_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*given: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    kept = retention(tmp_path)
    for step in (10, 20):
        save(tmp_path, step)
        kept.apply()
    assert capsys.readouterr().out.count("--ckpt_path last works without it") == 2 + 1  # of `save` each time
    assert resolve_checkpoint("last", tmp_path, "val/loss", "min").step == 20
