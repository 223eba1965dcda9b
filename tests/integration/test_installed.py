"""The program as pip installs it: a wheel alone, far from the repository, in a process that starts from nothing."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from mft_lightning.cli import main
from tests.conftest import ROOT
from tests.integration.conftest import checkpoints, everything

BUILT_FROM = ("mft_lightning", "configs", "examples", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
BESIDE = ("MANIFEST.in", "constraints.txt", "tests")
STARTER = ("configs", "examples/model", "examples/quickstart")  # of the repository, as they are in a project


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves directories in its source."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for name in (*BUILT_FROM, *BESIDE):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, source / name)
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(built)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    return next(built.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as pip builds it, of what the source distribution holds."""
    built = tmp_path_factory.mktemp("wheel")
    line = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(built), str(sdist)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run ``python -m mft_lightning …`` from the installed wheel in a directory; what it prints."""
    target = tmp_path_factory.mktemp("target")
    line = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(line, check=True, capture_output=True)

    def run(directory: Path, *words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "mft_lightning", *words]
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def files_of(root: Path, *names: str) -> dict[str, bytes]:
    """Path below ``root`` to contents."""
    found = [path for name in names for path in (root / name).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def test_a_source_distribution_holds_what_a_wheel_is_built_from(sdist: Path) -> None:
    """And no tests, of which setuptools would take some."""
    with tarfile.open(sdist) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {name for name in files_of(ROOT, "mft_lightning", "configs", "examples") if "__pycache__" not in name}
    assert wanted | {"constraints.txt", "LICENSE"} <= held
    assert not [name for name in held if name.startswith("tests")]


def test_a_wheel_holds_all_code_configs_examples_and_the_licence(wheel: Path) -> None:
    """A package that setup.cfg does not name would be missing."""
    with zipfile.ZipFile(wheel) as opened:
        held = set(opened.namelist())
    code = {name for name in files_of(ROOT, "mft_lightning") if "__pycache__" not in name}
    beside = {f"mft_lightning/{name}" for name in files_of(ROOT, "configs", "examples")}
    assert {"mft_lightning/py.typed", "mft_lightning/configs/lora.yaml"} <= held and "mft_lightning/cli.py" in code
    assert code | beside == {name for name in held if ".dist-info/" not in name}
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_a_project_from_an_installed_wheel_trains_as_it_is(installed: Callable[..., str], tmp_path: Path) -> None:
    printed = installed(tmp_path, "--version").splitlines()
    told = {"torch": version("torch"), "lightning": version("lightning"), "transformers": version("transformers")}
    assert {f"{name} {number}" for name, number in told.items()} <= set(printed)
    assert f"mft_lightning {version('mft_lightning')}" in printed
    assert "cd project && " in installed(tmp_path, "init", "project")
    project = tmp_path / "project"
    assert files_of(project, *STARTER) == files_of(ROOT, *STARTER)
    script = Path("examples/public_tasks.py")  # of the tutorial
    assert (project / script).read_bytes() == (ROOT / script).read_bytes()
    quick = ("--trainer.max_steps", "2", "--evaluation.max_conversations_per_task", "2")
    printed = installed(project, "fit", "--config", "configs/quickstart.yaml", *quick)
    assert "step 2/2" in printed and checkpoints(project / "checkpoints" / "quickstart") == ["step-00000002"]
    # also without a project, from configs and examples inside of the wheel
    printed = installed(tmp_path, "inspect", "--config", "configs/quickstart.yaml", "--limit", "1")
    assert "text_to_code" in printed and everything(tmp_path / "checkpoints") == []


def test_the_commands_that_a_project_s_readme_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "project")]) == 0
    monkeypatch.chdir(tmp_path / "project")
    commands = re.findall(r"^python -m mft_lightning (.+)$", Path("README.md").read_text(), re.MULTILINE)
    quick = ["--trainer.max_steps", "1", "--evaluation.max_conversations_per_task", "1", "--model.lora.r", "2"]
    assert [line.split()[0] for line in commands] == ["fit", "inspect", "estimate", "fit"]
    for line in commands:
        words = line.split()
        assert main([*words, *(quick[: 6 if "lora" in line else 4] if words[0] == "fit" else [])]) == 0, line
    assert "tensorboard --logdir checkpoints/quickstart/runs" in Path("README.md").read_text()
    assert list(Path("checkpoints/quickstart/runs").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("there", ["directory", "file", "link"])
def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str], there: str) -> None:
    project = tmp_path / "project"
    if there == "link":
        project.symlink_to(tmp_path / "nowhere")
    else:
        (project / "mine").mkdir(parents=True) if there == "directory" else project.write_text("mine")
    before = everything(tmp_path)
    assert main(["init", str(project)]) == 1
    assert capsys.readouterr().err == (
        f"error: init {project}: is there already. Give a new directory; nothing is overwritten.\n"
    )
    assert everything(tmp_path) == before


def test_a_project_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    assert main(["init", str(tmp_path / "new" / "project")]) == 1
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert everything(tmp_path) == []
