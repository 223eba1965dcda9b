"""How many devices a run has, by its configuration and by what torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lightning.pytorch.accelerators import CPUAccelerator

from mft_lightning import ranks
from mft_lightning.errors import UserError
from mft_lightning.training.layout import Layout, find_layout


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of one of two machines with four processes each."""
    said = {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}
    said |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "1"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    for module in ("lightning.fabric.utilities.rank_zero", "lightning_utilities.core.rank_zero"):
        monkeypatch.setattr(f"{module}.rank_zero_only.rank", 0)  # which Lightning sets for good


@pytest.mark.parametrize(("devices", "count"), [("auto", 1), (2, 2), ("3", 3), ("1", 1)])
def test_without_a_launcher_it_is_what_is_asked_for(devices: Any, count: int) -> None:
    layout = find_layout("cpu", devices, 2)
    assert layout == Layout(devices, count, 2) and layout.total == 2 * count


def test_what_is_left_open_is_what_torchrun_started(torchrun: None) -> None:
    assert find_layout("cpu", "auto", 1) == find_layout("cpu", 4, 2) == Layout(4, 4, 2)
    assert find_layout("cpu", "auto", 1).total == 8


@pytest.mark.parametrize(
    ("devices", "nodes", "message"),
    [
        (2, 1, r"trainer\.devices: 2 asks for 2 on each node, but torchrun started 4 process\(es\) on this one"),
        ("auto", 3, r"trainer\.num_nodes: 3, but torchrun started processes on 2"),
    ],
)
def test_a_contradiction_is_an_error(torchrun: None, devices: Any, nodes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_layout("cpu", devices, nodes)


# One of the tasks that srun started on three nodes of a job, as SLURM 22.05 says it.
TASK = {"SLURM_JOB_ID": "4071", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu-[07-08,11],login"}
TASK |= {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}
TASK |= {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_NTASKS": "6"}


@pytest.fixture
def srun(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets this process be a task of srun's, which differs in some variables."""

    def start(**others: str) -> None:
        for name, value in {**TASK, **others}.items():
            os.environ[name] = value
        ranks.hear_srun()

    for module in ("lightning.fabric.utilities.rank_zero", "lightning_utilities.core.rank_zero"):
        monkeypatch.setattr(f"{module}.rank_zero_only.rank", 0)
    before = dict(os.environ)
    yield start
    os.environ.clear()
    os.environ.update(before)


def test_what_is_left_open_is_what_srun_started(srun: Callable[..., None]) -> None:
    srun()
    said = {name: os.environ[name] for name in ranks.LAUNCHED}
    where = {"MASTER_ADDR": "gpu-07", "MASTER_PORT": str(15000 + 4071 * 4 + 2 - 16000)}
    assert said == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "6", **where}
    assert find_layout("cpu", "auto", 1) == find_layout("cpu", 2, 3) == Layout(2, 2, 3)


def test_where_srun_s_ranks_meet_can_be_said(srun: Callable[..., None]) -> None:
    srun(MASTER_ADDR="10.0.0.7", MASTER_PORT="29500")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.7", "29500")


def test_srun_s_only_node_is_this_machine(srun: Callable[..., None]) -> None:
    srun(SLURM_STEP_NODELIST="gpu-07", SLURM_STEP_TASKS_PER_NODE="6", SLURM_NODEID="0", SLURM_LOCALID="5")
    assert (os.environ["MASTER_ADDR"], os.environ["LOCAL_WORLD_SIZE"]) == ("127.0.0.1", "6")


@pytest.mark.parametrize("others", [dict.fromkeys(ranks.LAUNCHED, "1"), {"SLURM_STEP_NUM_TASKS": "1"}])
def test_torchrun_below_srun_and_a_task_alone_stay_as_they_are(
    srun: Callable[..., None], others: dict[str, str]
) -> None:
    srun(**others)
    assert "GROUP_RANK" not in os.environ


@pytest.mark.parametrize(
    ("devices", "nodes", "others", "message"),
    [
        (4, 1, {}, r"but srun started 2 process\(es\) on this one\. Give srun --ntasks-per-node 4, or leave"),
        ("auto", 2, {}, r"but srun started processes on 3\. Give srun --nodes 2, or leave"),
        ("auto", 1, {"SLURM_STEP_TASKS_PER_NODE": "1(x2),4"}, "srun started 4 .* on this node, but 6 in all"),
    ],
)
def test_srun_with_other_tasks_is_an_error(
    srun: Callable[..., None], devices: Any, nodes: int, others: dict[str, str], message: str
) -> None:
    srun(**others)
    with pytest.raises(UserError, match=message):
        find_layout("cpu", devices, nodes)


LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NODELIST": "localhost"}
SLURM |= {f"SLURM_{name}": "0" for name in ("PROCID", "LOCALID", "NODEID")}
SRUN = {**SLURM, "SLURM_NTASKS_PER_NODE": "2"}
STEP = {**SRUN, "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize("environment", [{}, LAUNCHED, STEP, {**STEP, "LOCAL_RANK": "0"}, {"NODE_RANK": "0"}])
def test_an_environment_that_agrees(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_layout("cpu", 2, 1).total == 2


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK: in the environment .* without RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK: in the environment .* without LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "TORCHELASTIC_RUN_ID: in the environment .* without RANK"),
        ({"GROUP_RANK": "1"}, "GROUP_RANK is 1 in the environment"),
        ({"NODE_RANK": ""}, "NODE_RANK: '' in the environment is no number"),
        (SRUN, "of which SLURM starts none by itself"),
        ({**LAUNCHED, "WORLD_SIZE": "1"}, r"WORLD_SIZE is 1 in the environment, but .* give 2 device\(s\)"),
        ({"NODE_RANK": "1"}, "NODE_RANK is 1 in the environment"),
        ({**SRUN, "SLURM_NTASKS": "1"}, r"SLURM has 1 task\(s\)\. .* srun --nodes 1 --ntasks-per-node 2"),
        (SLURM, "^trainer: You set `--ntasks=2`"),
    ],
)
def test_an_environment_of_another_run(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        find_layout("cpu", 2, 1)


@pytest.mark.parametrize("devices", [0, "many", -3, [0, 0]])
def test_devices_that_there_cannot_be(devices: Any) -> None:
    with pytest.raises(
        UserError, match=r"^trainer.devices: .* is refused; of cpu it takes a number from 1 on, or auto. See"
    ):
        find_layout("cpu", devices, 1)


class TwoGPUs(CPUAccelerator):
    """As a machine with two says."""

    @staticmethod
    def auto_device_count() -> int:
        return 2

    @staticmethod
    def name() -> str:
        return "cuda"


@pytest.mark.parametrize(
    ("accelerator", "nodes", "message"),
    [
        (
            "gpuu",
            1,
            "trainer.accelerator: 'gpuu' is refused; it takes one of auto, cpu, gpu, cuda, mps. The nearest is gp",
        ),
        ("gpu", 1, "trainer.accelerator: gpu, but PyTorch finds none on this machine. Use cpu, or auto"),
        ("mps", 1, "trainer.accelerator: mps, but PyTorch finds none on this machine"),
        ("cpu", 0, "trainer.num_nodes: 0 is less than 1. See docs/parallel.md"),
        (
            TwoGPUs(),
            1,
            "'many' is refused; of cuda it takes a number from 1 to 2, -1 or auto for all that are here",
        ),
    ],
)
def test_a_machine_that_there_cannot_be(
    monkeypatch: pytest.MonkeyPatch, accelerator: Any, nodes: int, message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        find_layout(accelerator, "many", nodes)
