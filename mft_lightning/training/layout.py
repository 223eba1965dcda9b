"""How many devices a run has: what the configuration asks for, the machine has, and a launcher has started."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mft_lightning import meeting, ranks
from mft_lightning.documented import page
from mft_lightning.errors import UserError
from mft_lightning.refusals import refusal

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


@dataclass(frozen=True)
class Layout:
    """Devices of each node (a number, or which ones), and nodes."""

    devices: Any
    count: int
    nodes: int

    @property
    def total(self) -> int:
        return self.count * self.nodes


def find_layout(accelerator: Any, devices: Any, num_nodes: int) -> Layout:
    """The layout of a run; what torchrun or srun started stands for what is left open.

    Args:
        accelerator: ``trainer.accelerator``.
        devices: ``trainer.devices``, where "auto" is open.
        num_nodes: ``trainer.num_nodes``, where 1 is open.

    Raises:
        UserError: devices that are not there, or others than a launcher has started processes for.
    """
    if not (TorchElasticEnvironment.detect() and ranks.is_launched()):
        _check_environment()
        layout = Layout(devices, _count(accelerator, devices, num_nodes), num_nodes)
        _check_layout(layout)
        return layout
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    count = local if devices == "auto" else _count(accelerator, devices, num_nodes)
    nodes = max(1, world // local)
    by_srun = os.environ[meeting.ELASTIC].startswith("slurm-")
    launcher, per_node, on = (
        ("srun", "--ntasks-per-node", "--nodes") if by_srun else ("torchrun", "--nproc-per-node", "--nnodes")
    )
    if nodes * local != world:
        raise UserError(
            f"{launcher} started {local} process(es) on this node, but {world} in all. Each node needs as many."
        )
    if count != local:
        raise UserError(
            f"trainer.devices: {devices} asks for {count} on each node, but {launcher} started {local} process(es) on "
            f"this one. Give {launcher} {per_node} {count}, or leave trainer.devices out."
        )
    if num_nodes not in (1, nodes):
        raise UserError(
            f"trainer.num_nodes: {num_nodes}, but {launcher} started processes on {nodes}. Give {launcher} {on} "
            f"{num_nodes}, or leave trainer.num_nodes out."
        )
    return Layout(local if devices == "auto" else devices, count, nodes)


def data_parallel_size(layout: Layout, tensor_parallel_size: int) -> int:
    """How many share out the data, where so many devices share each layer.

    Raises:
        UserError: a size that is none, or does not divide the devices.
    """
    key = "parallel.tensor_parallel_size"
    if tensor_parallel_size < 1:
        raise UserError(f"{key}: {tensor_parallel_size} is less than 1.")
    if layout.total % tensor_parallel_size:
        raise UserError(
            f"{key}: {tensor_parallel_size} does not divide the {layout.total} device(s) of trainer.devices and "
            "trainer.num_nodes."
        )
    return layout.total // tensor_parallel_size


def slurm_task() -> list[SLURMEnvironment]:
    """The plugin of a run that is SLURM's only task.

    Lightning's own choice puts the job in the queue again at SIGUSR1, with a checkpoint of its own form.
    """
    alone = not TorchElasticEnvironment.detect() and SLURMEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if alone else []


def _check_environment() -> None:
    """Refuse what is left of a launcher's variables; else libraries take this process for a rank that it is not."""
    given = {name: os.environ[name] for name in (meeting.ELASTIC, *meeting.LAUNCHED) if name in os.environ}
    telling = given.keys() & {meeting.ELASTIC, "RANK", "LOCAL_RANK"}
    missing = [name for name in meeting.LAUNCHED if not given.get(name)]
    if telling and missing and not SLURMEnvironment.detect():
        raise UserError(
            f"{', '.join(sorted(telling))}: in the environment as of a launcher's process, but without "
            f"{', '.join(missing)}. Unset what is left of another run."
        )
    for name in ("NODE_RANK", "GROUP_RANK"):
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"{name}: {os.environ[name]!r} in the environment is no number.")


def _check_layout(layout: Layout) -> None:
    """Refuse what a launcher says, or another run has left, that is not the run that is asked for.

    Else ranks would wait for others that nobody starts, or each train alone.
    """
    asked = f"trainer.devices and trainer.num_nodes give {layout.total} device(s)"
    variables = os.environ
    if SLURMEnvironment.detect():
        srun = f"Start it with srun --nodes {layout.nodes} --ntasks-per-node {layout.count}."
        if (tasks := int(variables["SLURM_NTASKS"])) != layout.total:
            raise UserError(f"{asked}, but SLURM has {tasks} task(s). {srun}")
        if layout.total > 1 and "SLURM_STEP_ID" not in variables:  # which srun sets
            raise UserError(f"{asked}, of which SLURM starts none by itself. {srun}")
    name = "NODE_RANK" if "NODE_RANK" in variables else "GROUP_RANK"
    if int(variables.get(name, "0")) >= layout.nodes:
        raise UserError(f"{name} is {variables[name]} in the environment, but {asked}. Unset it.")
    if ranks.is_launched() and int(variables["WORLD_SIZE"]) != layout.total:
        raise UserError(
            f"WORLD_SIZE is {variables['WORLD_SIZE']} in the environment, but {asked}. Make them agree, or unset it."
        )


def _count(accelerator: Any, devices: Any, num_nodes: int) -> int:
    """Devices of a node, as Lightning counts them."""
    _check_accelerator(accelerator)
    if num_nodes < 1:
        raise UserError(f"trainer.num_nodes: {num_nodes} is less than 1. See {page('trainer.num_nodes')}.")
    try:
        return _trainer(accelerator, devices, num_nodes).num_devices
    except _REFUSED as error:
        with suppress(*_REFUSED):
            kind = _trainer(accelerator, 1, num_nodes).accelerator
            raise UserError(_no_such_devices(devices, kind)) from error
        raise UserError(f"trainer: {error}") from error


_REFUSED = (MisconfigurationException, ModuleNotFoundError, RuntimeError, ValueError, TypeError)  # how Lightning does


def _trainer(accelerator: Any, devices: Any, num_nodes: int) -> L.Trainer:
    asked: dict[str, Any] = {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run's own Trainer gives them
        return L.Trainer(**asked, logger=False, enable_checkpointing=False, enable_progress_bar=False)


def _check_accelerator(accelerator: Any) -> None:
    """Refuse what is none, or is not here, of which Lightning speaks in names of its own."""
    key = "trainer.accelerator"
    if not isinstance(accelerator, str):
        return
    if accelerator not in ACCELERATORS:
        raise UserError(refusal(key, accelerator, {"enum": list(ACCELERATORS)}, page))
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    here["gpu"] = any(here.values())
    if not here.get(accelerator, True):
        raise UserError(
            f"{key}: {accelerator}, but PyTorch finds none on this machine. Use cpu, or auto, which takes what there "
            f"is. See {page(key)}."
        )


def _no_such_devices(devices: Any, kind: Accelerator) -> str:
    """What there is in the place of devices that there cannot be."""
    key, number = "trainer.devices", kind.auto_device_count()
    takes = "a number from 1 on, or auto"
    if kind.name() != "cpu":
        takes = f"a number from 1 to {number}, -1 or auto for all that are here, or a list of some, 0 to {number - 1}"
    return f"{key}: {devices!r} is refused; of {kind.name()} it takes {takes}. See {page(key)}."
