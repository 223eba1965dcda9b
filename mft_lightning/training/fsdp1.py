"""Lightning's FSDPStrategy (FSDP1), named by its class path; ``fsdp`` is FSDP2. Not yet run on a GPU.

What Lightning leaves out is added here: layers are wrapped without a policy having to be named, gradients can be
clipped (https://github.com/Lightning-AI/pytorch-lightning/issues/19235), and checkpoints are those of every strategy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
    StateDictType,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import Optimizer

from mft_lightning.errors import UserError
from mft_lightning.model.module import MFTModule
from mft_lightning.model.parallel import live_parameters, transformer_layers
from mft_lightning.training.launcher import LaunchedStrategy
from mft_lightning.training.layout import Layout

# trainer.precision -> how gathered weights are held and gradients reduced; buffers, the rotary frequencies, stay as
# they are, which Lightning would round too
MIXED_PRECISION = {
    "bf16-mixed": MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    "bf16-true": MixedPrecision(reduce_dtype=torch.float32),
    "16-mixed": MixedPrecision(param_dtype=torch.float16, reduce_dtype=torch.float16),
}


class FlatShardedStrategy(LaunchedStrategy, FSDPStrategy):
    """FSDP1 with the settings of a strategy that the configuration made.

    Args:
        given: that strategy, which is not used any further.
        layout: the devices to share out over.
        command: the words that start a further rank.

    Raises:
        UserError: a setting that cannot be had here.
    """

    short_name = "FSDPStrategy"

    def __init__(self, given: FSDPStrategy, layout: Layout, command: Sequence[str]) -> None:
        self.adopt(given, command)
        self._check_shards(layout)
        if self._state_dict_type != "full":
            raise UserError(
                "trainer.strategy.init_args.state_dict_type: sharded is no Hugging Face directory. Leave it out."
            )
        if not self.kwargs["use_orig_params"]:
            raise UserError(
                "trainer.strategy.init_args.use_orig_params: false leaves no matrices to tell from biases, which decay "
                "differently. Leave it out."
            )

    def _check_shards(self, layout: Layout) -> None:
        """Refuse what leaves each device with everything: FSDP1 then reduces no gradients over copies.

        Neither does it give back the frozen weights of an adapter (NO_SHARD, torch 2.13, which warns of it).
        """
        key, kind, mesh = "trainer.strategy.init_args", self.sharding_strategy, self.kwargs.get("device_mesh")
        hybrid = kind in (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
        if layout.total == 1:
            raise UserError(f"trainer.strategy: {self.short_name} has one device to share out over. Use auto.")
        if kind == ShardingStrategy.NO_SHARD:
            raise UserError(f"{key}.sharding_strategy: NO_SHARD shares out nothing. Use trainer.strategy: ddp.")
        if mesh is not None and not hybrid:
            raise UserError(f"{key}.device_mesh: is for sharding_strategy: HYBRID_SHARD. Leave it out.")
        copies, shards = mesh or ((layout.nodes, layout.count) if hybrid else (1, layout.total))
        if copies * shards != layout.total:
            raise UserError(f"{key}.device_mesh: {copies} x {shards} is not the {layout.total} devices of the run.")
        if shards == 1:
            raise UserError(f"{key}: {copies} copies of 1 shard share out nothing. Use trainer.strategy: ddp.")

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:
        return self.mixed_precision or MIXED_PRECISION.get(self.precision_plugin.precision)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Wrap the network, not the module around it, whose one step is several forwards and backwards."""
        module = cast(MFTModule, model)
        assert module.network is not None
        layers = {type(layer) for layer in transformer_layers(module.network)}
        options = {"auto_wrap_policy": ModuleWrapPolicy(layers), **self.kwargs}
        self.kwargs.pop("auto_wrap_policy", None)  # Lightning warns of one where something is wrapped already
        module.network = cast(
            Any,
            FullyShardedDataParallel(
                module.network,
                cpu_offload=self.cpu_offload,
                mixed_precision=self.mixed_precision_config,
                sharding_strategy=self.sharding_strategy,
                device_id=self.root_device,
                **options,
            ),
        )
        return super()._setup_model(model)

    # ---------------------------------------------------------------- checkpoints, as without sharding

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gathered on rank 0, empty elsewhere."""
        assert self.model is not None
        with self._whole(rank0_only=True):
            return self.model.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """In the optimizer's own numbering, as every other strategy has it; Lightning's is over all parameters."""
        assert self.model is not None
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        with self._whole(rank0_only=True):
            named = FullyShardedDataParallel.optim_state_dict(self.model, plain)
        numbers = {name: number for number, name in enumerate(self._names(plain))}
        return _renamed(named, numbers) if self.is_global_zero else {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        with self._whole(rank0_only=False):
            self.model.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = _renamed(saved, dict(enumerate(self._names(optimizer))))
            with self._whole(rank0_only=False):
                state = FullyShardedDataParallel.optim_state_dict_to_load(self.model, optimizer, named)
            optimizer.load_state_dict(state)

    def _whole(self, *, rank0_only: bool) -> AbstractContextManager[Any]:
        """States are whole tensors in host memory inside."""
        assert self.model is not None
        offload = self.root_device.type != "cpu"  # where it is there already, FSDP1 copies nothing, and frees it
        return FullyShardedDataParallel.state_dict_type(
            self.model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(offload_to_cpu=offload, rank0_only=rank0_only),
            FullOptimStateDictConfig(offload_to_cpu=offload, rank0_only=rank0_only),
        )

    def _names(self, optimizer: Optimizer) -> list[str]:
        """The optimizer's parameters by name, in its own order."""
        assert self.model is not None
        names = {parameter: name for name, parameter in live_parameters(self.model)}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with its parameters called otherwise."""
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: values for key, values in state["state"].items()}, "param_groups": groups}
