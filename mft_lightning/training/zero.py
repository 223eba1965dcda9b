"""Lightning's DeepSpeedStrategy (ZeRO 1 and 2), named by its class path. Not yet run on a GPU.

The engine reduces gradients when told that a step is complete, clips them itself by ``trainer.gradient_clip_val``, and
keeps the master weights and the optimizer's states in flat partitions; here they are gathered by parameter, so that
checkpoints are those of every other strategy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from mft_lightning.errors import NotYetError, UserError
from mft_lightning.model.module import MFTModule
from mft_lightning.training.launcher import LaunchedStrategy

STAGES = (1, 2)
ELSEWHERE = {  # keys of DeepSpeed's configuration that a run decides, and where to say it here
    "gradient_clipping": "trainer.gradient_clip_val",
    "gradient_accumulation_steps": "data.gradient_accumulation_steps",
    "train_batch_size": "data.total_train_batch_size",
    "bf16": "trainer.precision",
    "fp16": "trainer.precision",
    "amp": "trainer.precision",
}
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of every element of a parameter


class ZeroStrategy(LaunchedStrategy, DeepSpeedStrategy):
    """DeepSpeed's engine with the settings of a strategy that the configuration made.

    Args:
        given: that strategy, which is not used any further.
        command: the words that start a further rank.

    Raises:
        UserError: a setting that has another home here.
        NotYetError: a setting whose checkpoints could not be read back.
    """

    short_name = "DeepSpeedStrategy"

    def __init__(self, given: DeepSpeedStrategy, command: Sequence[str]) -> None:
        self.adopt(given, command)
        self.trained: list[nn.Parameter] = []  # in the optimizer's own order
        key, settings = "trainer.strategy (DeepSpeedStrategy)", cast("dict[str, Any]", self.config)
        zero = settings.get("zero_optimization", {})
        if zero.get("stage") not in STAGES:
            raise NotYetError(f"{key} stage", zero.get("stage"), "Use 1 or 2, or trainer.strategy: fsdp.")
        if any(zero.get(f"offload_{what}", {}).get("device", "none") != "none" for what in ("optimizer", "param")):
            raise NotYetError(key, "offload", "Use trainer.strategy: fsdp with parallel.cpu_offload.")
        for name, here in ELSEWHERE.items():
            if name in settings:
                raise UserError(f"trainer.strategy.init_args.config: {name} is not decided there. Use {here}.")
        for name, value in settings.get("activation_checkpointing", {}).items():
            if value:
                raise UserError(
                    f"trainer.strategy (DeepSpeedStrategy): {name} has no effect on transformers' layers. Use "
                    "model.checkpoint_activations."
                )
        if "optimizer" in settings or "scheduler" in settings:
            raise NotYetError(key, "optimizer", "Leave it out of DeepSpeed's configuration; model.* has its settings.")
        settings.setdefault("train_micro_batch_size_per_gpu", 1)  # for its timers; Lightning would ask the loader

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)  # without Lightning's check, which was made before
        self.meet()

    def setup_distributed(self) -> None:
        import deepspeed

        self.set_world_ranks()
        deepspeed.init_distributed(self._process_group_backend, auto_mpi_discovery=False)  # which the ranks have joined

    def _init_optimizers(self) -> Any:
        optimizer, scheduler = super()._init_optimizers()
        self.trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return optimizer, scheduler

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning gives the optimizer to a step's last backward alone, after which gradients are reduced."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(optimizer is not None)
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Also keep the norm before clipping, which the engine knows only now: infinite where it skipped the step."""
        result = super().optimizer_step(*args, **kwargs)
        last = cast(MFTModule, self.lightning_module).last_step
        assert last is not None
        last.grad_norm = float(self.deepspeed_engine.get_global_grad_norm())
        return result

    # ---------------------------------------------------------------- checkpoints, as without DeepSpeed

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """With the master weights, where the module's are their rounded copies."""
        from deepspeed.utils import safe_get_full_fp32_param

        module = cast(MFTModule, self.lightning_module)
        state = module.state_dict()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                whole = safe_get_full_fp32_param(parameter)
                state[name] = whole.to(module.source.dtype).reshape(parameter.shape)
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        zero: Any = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        moments = {}
        if zero.optimizer.state:  # else every step so far was skipped
            _link_moments(zero)
            step = next(iter(zero.optimizer.state.values()))["step"]
            for number, parameter in enumerate(self.trained):
                whole = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
                shaped = {key: value.reshape(parameter.shape) for key, value in whole.items()}
                moments[number] = {"step": step.clone(), **shaped}  # every parameter counts for itself
        groups, start = [], 0
        for group, members in zip(zero.param_groups, zero.bit16_groups, strict=True):
            settings = {key: value for key, value in group.items() if key != "params"}
            groups.append({**settings, "params": list(range(start, start + len(members)))})
            start += len(members)
        return {"state": moments, "param_groups": groups}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        module = cast(MFTModule, self.lightning_module)
        module.load_state_dict(checkpoint["state_dict"], strict=strict)
        if self.optimizers:
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    safe_set_full_fp32_param(parameter, checkpoint["state_dict"][name].float().to(parameter.device))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        (zero,), (saved,) = cast("list[Any]", self.optimizers), checkpoint["optimizer_states"]
        if not saved["state"]:
            return
        for partition in zero.single_partition_of_fp32_groups:
            moments = {key: torch.zeros_like(partition) for key in MOMENTS}
            zero.optimizer.state[partition] = {"step": saved["state"][0]["step"].clone(), **moments}
        _link_moments(zero)
        for number, parameter in enumerate(self.trained):
            for key in MOMENTS:
                value = saved["state"][number][key].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, key)


def _link_moments(zero: Any) -> None:
    """Let parameters find their moments in the flat partitions.

    DeepSpeed 0.19 does it once, after the step of the first parameter group, when the second has no moments yet
    (``_optimizer_step`` in runtime/zero/stage_1_and_2.py).
    """
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
