"""How many devices a run has: what the configuration asks for, the machine has, and a launcher has started."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mft_lightning.errors import UserError


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
    """The layout of a run; what torchrun started stands for what is left open.

    Args:
        accelerator: ``trainer.accelerator``.
        devices: ``trainer.devices``, where "auto" is open.
        num_nodes: ``trainer.num_nodes``, where 1 is open.

    Raises:
        UserError: devices that are not there, or others than a launcher has started processes for.
    """
    if not TorchElasticEnvironment.detect():
        layout = Layout(devices, _count(accelerator, devices, num_nodes), num_nodes)
        _check_environment(layout)
        return layout
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    count = local if devices == "auto" else _count(accelerator, devices, num_nodes)
    nodes = max(1, world // local)
    if count != local:
        raise UserError(
            f"trainer.devices: {devices} asks for {count} on each node, but torchrun started {local} process(es) on "
            f"this one. Give torchrun --nproc-per-node {count}, or leave trainer.devices out."
        )
    if num_nodes not in (1, nodes):
        raise UserError(
            f"trainer.num_nodes: {num_nodes}, but torchrun started processes on {nodes}. Give torchrun --nnodes "
            f"{num_nodes}, or leave trainer.num_nodes out."
        )
    return Layout(local if devices == "auto" else devices, count, nodes)


def _check_environment(layout: Layout) -> None:
    """Refuse what a launcher says, or another run has left, that is not the run that is asked for.

    Else ranks would wait for others that nobody starts, or each train alone.
    """
    asked = f"trainer.devices and trainer.num_nodes give {layout.total} device(s)"
    variables = os.environ
    if SLURMEnvironment.detect() and (tasks := int(variables["SLURM_NTASKS"])) != layout.total:
        srun = f"srun --nodes {layout.nodes} --ntasks-per-node {layout.count}"
        raise UserError(f"{asked}, but SLURM has {tasks} task(s). Start it with {srun}.")
    if int(variables.get("NODE_RANK", "0")) >= layout.nodes:
        raise UserError(f"NODE_RANK is {variables['NODE_RANK']} in the environment, but {asked}. Unset it.")
    if "LOCAL_RANK" not in variables or SLURMEnvironment.detect():
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in variables]
    if layout.total > 1 and missing:
        raise UserError(f"LOCAL_RANK is set, as by a launcher, but not {', '.join(missing)}. Set them or unset it.")
    if int(variables.get("WORLD_SIZE", layout.total)) != layout.total:
        raise UserError(
            f"WORLD_SIZE is {variables['WORLD_SIZE']} in the environment, but {asked}. Make them agree, or unset it."
        )


def _count(accelerator: Any, devices: Any, num_nodes: int) -> int:
    """Devices of a node, as Lightning counts them."""
    asked: dict[str, Any] = {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run's own Trainer gives them
            trainer = L.Trainer(**asked, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    except (MisconfigurationException, ModuleNotFoundError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"trainer: {error}") from error
    return trainer.num_devices
