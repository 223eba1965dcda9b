"""AdamW's parameter groups, and learning rates that warm up and decay to ``min_lr``."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mft_lightning.errors import UserError
from mft_lightning.model.gradients import by_mesh
from mft_lightning.model.own_optimizer import OwnOptimizer, build_own_optimizer, check_own_optimizer

OptimizerKind = Literal["adamw", "paged_adamw"]
SchedulerType = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "cosine_with_restarts",
    "log_warmup_linear_decay",
]
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}  # what means nothing to others, by default
SCHEDULERS: tuple[str, ...] = get_args(SchedulerType)


@dataclass(kw_only=True)
class OptimizerSettings:
    """AdamW and its learning rate; :class:`~mft_lightning.model.module.MFTModule` documents the keys.

    Raises:
        UserError: a value that cannot work, naming its key.
    """

    kind: OptimizerKind | OwnOptimizer
    learning_rate: float
    min_lr: float
    num_warmup_steps: int
    lr_scheduler_type: SchedulerType
    lr_power: float
    lr_num_cycles: int
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    loraplus_lr_ratio: float | None = None
    name: str = field(init=False)  # of the optimizer: its kind, or a class path

    def __post_init__(self) -> None:
        for key in ("learning_rate", "lr_power", "lr_num_cycles", "adam_epsilon"):
            if not 0 < getattr(self, key) < math.inf:
                raise UserError(f"model.{key}: {getattr(self, key)} is no number above 0.")
        for key in ("num_warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"model.{key}: {getattr(self, key)} is no number from 0 on.")
        for key in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"model.{key}: {getattr(self, key)} is not in [0, 1).")
        if not 0 <= self.min_lr <= self.learning_rate:
            raise UserError(
                f"model.min_lr: {self.min_lr} is not between 0 and model.learning_rate: {self.learning_rate}."
            )
        self.name = self.kind if isinstance(self.kind, str) else check_own_optimizer(self.kind, self.weight_decay)
        for key, default in ADAM.items():
            if not isinstance(self.kind, str) and getattr(self, key) != default:
                raise UserError(f"model.{key}: has no effect on {self.name}. Set it back to {default}.")

    @property
    def is_own(self) -> bool:
        """Whether it is a class of the user's own."""
        return not isinstance(self.kind, str)

    def build(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        matrices: Collection[str],
        total_steps: int,
        *,
        scaled: bool = False,
    ) -> tuple[Optimizer, LambdaLR]:
        """The optimizer of named parameters, those that train, and its schedule over ``total_steps``.

        Args:
            parameters: by name, as they will be trained.
            matrices: the names of those that decay, of :func:`matrix_names`.
            total_steps: of the whole run.
            scaled: whether a scaler of the loss multiplies gradients. It leaves those of a fused optimizer scaled for
                the optimizer to undo, and they would be measured and clipped so.
        """
        groups = self._groups(parameters, matrices)
        betas = (self.adam_beta1, self.adam_beta2)
        optimizer: Optimizer
        if not isinstance(self.kind, str):
            optimizer = build_own_optimizer(self.kind, groups, self.learning_rate)
        elif self.kind == "paged_adamw":
            from mft_lightning.model.paged import PagedAdamW  # which imports bitsandbytes

            optimizer = PagedAdamW(groups, lr=self.learning_rate, betas=betas, eps=self.adam_epsilon)
        else:
            alike = all(len(by_mesh(group["params"])) == 1 for group in groups)
            how: dict[str, Any] = {"fused": not scaled} if alike else {"foreach": False}
            optimizer = AdamW(groups, lr=self.learning_rate, betas=betas, eps=self.adam_epsilon, **how)
        factor = learning_rate_factor(
            self.lr_scheduler_type,
            warmup_steps=self.num_warmup_steps,
            total_steps=total_steps,
            min_ratio=self.min_lr / self.learning_rate,
            power=self.lr_power,
            num_cycles=self.lr_num_cycles,
        )
        return optimizer, LambdaLR(optimizer, factor)

    def try_out(self, parameters: Iterable[tuple[str, nn.Parameter]], matrices: Collection[str]) -> None:
        """Make an optimizer of the user's own once, so that one that cannot be made ends a run before it begins."""
        if not isinstance(self.kind, str):
            build_own_optimizer(self.kind, self._groups(parameters, matrices), self.learning_rate)

    def _groups(
        self, parameters: Iterable[tuple[str, nn.Parameter]], matrices: Collection[str]
    ) -> list[dict[str, Any]]:
        if self.loraplus_lr_ratio is None:
            return parameter_groups(parameters, matrices, self.weight_decay)
        rate, ratio = self.learning_rate, self.loraplus_lr_ratio
        return loraplus_groups(parameters, matrices, self.weight_decay, rate=rate, ratio=ratio)


def group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The rates and decays of each parameter group."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def put_in_force(settings: list[dict[str, Any]], optimizer: Optimizer, scheduler: LambdaLR) -> None:
    """Set an optimizer's rates and decays to ``settings`` (of :func:`group_settings`), at the schedule's step."""
    scheduler.base_lrs = [group["initial_lr"] for group in settings]
    for i, (group, configured) in enumerate(zip(optimizer.param_groups, settings, strict=True)):
        group.update(configured)
        group["lr"] = scheduler.base_lrs[i] * scheduler.lr_lambdas[i](scheduler.last_epoch)
        if group.get("fused"):  # it counts steps where the weight is, others may have saved theirs on the host
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                state.update({key: value.to(parameter.device) for key, value in state.items() if key == "step"})


def matrix_names(module: nn.Module) -> set[str]:
    """Parameters of two dimensions or more, asked before they are sharded, which may leave them one."""
    return {name for name, parameter in module.named_parameters() if parameter.ndim >= 2}


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], matrices: Collection[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay; biases and norms (fewer than two dimensions) do not."""
    trainable = [(name in matrices, parameter) for name, parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for matrix, parameter in trainable if matrix], "weight_decay": weight_decay},
        {"params": [parameter for matrix, parameter in trainable if not matrix], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def loraplus_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    matrices: Collection[str],
    weight_decay: float,
    *,
    rate: float,
    ratio: float,
) -> list[dict[str, Any]]:
    """The groups of :func:`parameter_groups`, each in two: what learns at ``rate``, and what at ``ratio`` times that.

    The faster ones are those of peft's ``create_loraplus_optimizer``: an adapter's second factor, and what is no matrix
    (DoRA's magnitudes, which it lets decay). Embeddings' adapters, which have a rate of their own there, there are none
    of here.
    """
    trainable = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    fast = [(name, parameter) for name, parameter in trainable if "lora_B" in name or name not in matrices]
    slow = [(name, parameter) for name, parameter in trainable if "lora_B" not in name and name in matrices]
    halves = ((slow, rate), (fast, ratio * rate))
    return [{**group, "lr": lr} for half, lr in halves for group in parameter_groups(half, matrices, weight_decay)]


def learning_rate_factor(
    scheduler: str,
    *,
    warmup_steps: int,
    total_steps: int,
    min_ratio: float = 0.0,
    power: float = 1.0,
    num_cycles: int = 1,
) -> Callable[[int], float]:
    """The learning rate of an optimizer step as a share of its peak.

    Step ``u`` (from 1) of ``T`` uses ``factor(u - 1)``, so that the first step already learns, step ``warmup_steps``
    is at the peak and step ``T`` at ``min_ratio``. Warm-up is linear, or logarithmic (``log(1 + u) / log(1 + W)``) for
    log_warmup_linear_decay. The constant ones stay at the peak.

    Args:
        scheduler: one of ``SCHEDULERS``.
        warmup_steps: ``W``.
        total_steps: ``T``.
        min_ratio: the floor of the decay, ``min_lr / learning_rate``.
        power: of the polynomial decay.
        num_cycles: cosine decays of cosine_with_restarts; each but the first starts again at the peak.

    Returns:
        Finished steps (``u - 1``) to factor.
    """
    if scheduler not in SCHEDULERS:
        raise UserError(f"model.lr_scheduler_type: {scheduler!r} is none of {', '.join(SCHEDULERS)}.")

    def factor(finished: int) -> float:
        step = finished + 1
        if step <= warmup_steps:
            if scheduler == "log_warmup_linear_decay":
                return math.log1p(step) / math.log1p(warmup_steps)
            return step / warmup_steps
        if scheduler in ("constant", "constant_with_warmup"):
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return min_ratio + (1.0 - min_ratio) * _decay(scheduler, progress, power, num_cycles)

    return factor


def _decay(scheduler: str, progress: float, power: float, num_cycles: int) -> float:
    """What is left of the way from peak to floor, from 1 at ``progress`` 0 to 0 at 1."""
    if progress >= 1.0:
        return 0.0
    if scheduler == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if scheduler == "cosine_with_restarts":
        return 0.5 * (1.0 + math.cos(math.pi * (progress * num_cycles % 1.0)))
    if scheduler == "polynomial":
        return (1.0 - progress) ** power
    return 1.0 - progress
