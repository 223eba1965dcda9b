"""From ``trainer.strategy`` to Lightning's strategies, with this program's launcher and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch.optim import Optimizer

from mft_lightning import ranks
from mft_lightning.documented import page
from mft_lightning.errors import NotYetError, UserError
from mft_lightning.model.module import MFTModule
from mft_lightning.model.parallel import ParallelSettings, fill, gathered_state, shard
from mft_lightning.refusals import refusal
from mft_lightning.schema import Node, class_form
from mft_lightning.training.fsdp1 import FlatShardedStrategy
from mft_lightning.training.launcher import LaunchedStrategy
from mft_lightning.training.layout import Layout
from mft_lightning.training.zero import ZeroStrategy

SHORT_NAMES = ("auto", "ddp", "fsdp")
TAKEN: Node = {"anyOf": [{"enum": list(SHORT_NAMES)}, class_form("Strategy")]}


class DataParallelStrategy(LaunchedStrategy, DDPStrategy):
    """DDP: every rank holds the whole model; gradients are reduced once per optimizer step."""

    short_name = "ddp"

    def __init__(self, settings: ParallelSettings, command: Sequence[str]) -> None:
        super().__init__(
            process_group_backend=ranks.backend(),
            find_unused_parameters=settings.find_unused_parameters,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,  # nothing in them changes
        )
        self.command = command


class AdoptedDDPStrategy(LaunchedStrategy, DDPStrategy):
    """Lightning's DDPStrategy, named by its class path, with the options it was given."""

    short_name = "DDPStrategy"

    def __init__(self, given: DDPStrategy, command: Sequence[str]) -> None:
        self.adopt(given, command)


class ShardedStrategy(LaunchedStrategy, ModelParallelStrategy):
    """FSDP2: weights, gradients and optimizer states are shared out over all devices of all nodes.

    With tensor parallelism, neighbouring devices share each layer's matrices, and groups of them the rest.

    Lightning's strategy leaves sharding to the module and writes checkpoints of its own forms. Here the network is
    sharded after it was built, and checkpoints are those of every other strategy: gathered on saving, and on loading
    each rank takes its shards out of the whole.
    """

    short_name = "fsdp"
    gathers = True  # the states below are in memory of their own

    def __init__(self, settings: ParallelSettings, precision: str, command: Sequence[str]) -> None:
        super().__init__(process_group_backend=ranks.backend())
        self.settings, self.precision, self.command = settings, precision, command

    @property
    def sharing(self) -> int:
        """How many devices share each layer's matrices."""
        return self.settings.tensor_parallel_size

    def setup_environment(self) -> None:
        self._tensor_parallel_size = self.settings.tensor_parallel_size
        self._data_parallel_size = self.num_nodes * self.num_processes // self._tensor_parallel_size
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        built = cast(MFTModule, self.lightning_module).built
        assert built is not None
        shard(built.network, self.device_mesh, self.settings, self.precision, built.complete)
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Nothing: sharding has put everything where it belongs, offloaded shards into host memory."""

    # ---------------------------------------------------------------- checkpoints, as without sharding

    @property
    def _each_writes(self) -> bool:
        """Whether every rank writes its own part of a checkpoint, of which then nothing is gathered."""
        return getattr(self.checkpoint_io, "shard_writer", None) is not None

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self._each_writes:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the weights: gathered on rank 0, empty tensors elsewhere."""
        module = cast(MFTModule, self.lightning_module)
        state = {name: value for name, value in module.state_dict().items() if name in module.saved_names}
        return state if self._each_writes else gathered_state(state, keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """In the optimizer's own numbering, as every other strategy has it."""
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = plain.state_dict()
        return state if self._each_writes else gathered_state(state, keep=self.is_global_zero)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        live = self.lightning_module.state_dict()  # type: ignore[union-attr]  # connected by now
        with torch.no_grad():
            for name, value in checkpoint["state_dict"].items():
                fill(live[name], value)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {name: _as_parameter(value, parameters[number]) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _as_parameter(value: Any, parameter: torch.Tensor) -> Any:
    """A moment of a parameter, sharded as that is; counters as they are."""
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    sharded = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    fill(sharded, value)
    return sharded


def make_strategy(
    asked: Any,
    settings: ParallelSettings,
    *,
    layout: Layout,
    precision: str,
    command: Sequence[str],
    undivided: str | None = None,
) -> str | Strategy:
    """The strategy of a run.

    Args:
        asked: ``trainer.strategy``: a short name, or Lightning's strategy that a class path made.
        settings: options of the short names.
        layout: the devices of the run.
        precision: ``trainer.precision``.
        command: the words that start a further rank.
        undivided: the key, if any, whose tensors devices cannot share out.

    Raises:
        UserError: an unknown name, options that the strategy does not have, or a strategy that cannot do this.
    """
    name = asked
    if asked == "auto" and layout.total > 1:
        name = "fsdp" if settings.tensor_parallel_size > 1 else "ddp"
    _check_options(name, settings)
    if undivided and (name == "fsdp" or isinstance(name, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy))):
        raise _cannot_share(undivided, name, settings)
    if isinstance(name, Strategy):
        return _adopted(name, layout=layout, precision=precision, command=command)
    if name == "ddp":
        return DataParallelStrategy(settings, command)
    if name == "fsdp":
        if precision == "16-mixed":
            raise UserError("trainer.precision: 16-mixed scales losses, which fsdp does not do. Use bf16-mixed.")
        return ShardedStrategy(settings, precision, command)
    if name != "auto":
        raise UserError(refusal("trainer.strategy", name, TAKEN, page))
    return "auto"


def _cannot_share(undivided: str, name: str | Strategy, settings: ParallelSettings) -> UserError:
    """What to say where tensors would be shared out over devices that bitsandbytes takes whole."""
    key, value = "trainer.strategy", name if isinstance(name, str) else type(name).__name__
    if settings.tensor_parallel_size > 1:
        key, value = "parallel.tensor_parallel_size", str(settings.tensor_parallel_size)
    return UserError(
        f"{key}: {value} cuts tensors and shares them out over devices, which those of {undivided} cannot be: "
        "bitsandbytes takes each whole, and holds few bits as one string of bytes with scales beside it. Use "
        "trainer.strategy: ddp, or do without that key."
    )


def _adopted(given: Strategy, *, layout: Layout, precision: str, command: Sequence[str]) -> Strategy:
    """A strategy of Lightning's that was named by its class path, with what it needs to run here.

    Not one derived from it, of which only the settings would be taken over.
    """
    key, kind = "trainer.strategy", type(given).__name__
    if type(given) is FSDPStrategy:
        if not cuda_is_available():
            raise UserError(
                f"{key}: {kind} (FSDP1) shards over CUDA GPUs alone. Use fsdp (FSDP2), which also runs on CPUs."
            )
        if precision == "64-true":
            raise UserError(f"trainer.precision: {kind} has no 64-true. Use trainer.strategy: fsdp.")
        return FlatShardedStrategy(given, layout, command)
    if type(given) is DeepSpeedStrategy:
        if not cuda_is_available():
            raise UserError(f"{key}: {kind} runs on CUDA GPUs alone. Use fsdp, which also runs on CPUs.")
        if precision == "16-mixed":
            raise NotYetError("trainer.precision", precision, f"Under {kind} use bf16-mixed.")
        return ZeroStrategy(given, command)
    if isinstance(given, ModelParallelStrategy):
        raise UserError(f"{key}: {kind} has no plan of its own for a model. Use fsdp, which is that strategy with one.")
    if type(given) is DDPStrategy:
        if given._start_method != "popen":
            raise UserError(f"{key}.init_args.start_method: {given._start_method} is not supported. Leave it out.")
        if given._ddp_kwargs.get("static_graph"):  # counts on one backward a step, and is wrong with several
            raise UserError(
                f"{key}: static_graph reduces wrong gradients where a step has micro-batches. Leave it out."
            )
        return AdoptedDDPStrategy(given, command)
    if isinstance(given, SingleDeviceStrategy):
        if layout.total > 1:
            raise UserError(f"{key}: {kind} is for one device, but trainer.devices and num_nodes give {layout.total}.")
        return given
    raise UserError(
        f"{key}: {kind} is not supported. Use {', '.join(SHORT_NAMES)}, or the class path of DDPStrategy, FSDPStrategy "
        "or DeepSpeedStrategy."
    )


def cuda_is_available() -> bool:
    return torch.cuda.is_available()


def _check_options(name: str | Strategy, settings: ParallelSettings) -> None:
    """Refuse options that would have no effect."""
    default = ParallelSettings()
    for key, strategy in (
        ("tensor_parallel_size", "fsdp"),
        ("reshard_after_forward", "fsdp"),
        ("cpu_offload", "fsdp"),
        ("find_unused_parameters", "ddp"),
    ):
        if name != strategy and getattr(settings, key) != getattr(default, key):
            raise UserError(
                f"parallel.{key}: is an option of trainer.strategy: {strategy}, which does not run here. Leave it out."
            )
