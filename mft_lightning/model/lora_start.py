"""What adapters start from: a draw, the largest part of the base's own weights, or another adapter.

PiSSA and OLoRA begin with a part of each matrix W in the adapter, and what is left of it, W - s B0 A0, in the base. So
that the base stays what it is on the disk, a checkpoint holds the adapter over W: of twice the rank, with factors
[B, -B0] and [A; A0]. What a run goes on with (A and B, and A0 and B0, which give that rest again) is in it to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mft_lightning import ranks
from mft_lightning.errors import UserError
from mft_lightning.model.lora import factors
from mft_lightning.model.seeding import one_thread, seeded

BASE = "base_model.model."  # before the base's names in peft's model


@dataclass
class LoraStart:
    """Gives adapters their first values, and takes out of the base what they begin with.

    Args:
        init: ``model.lora.init``.
        seed: of what is drawn.
        stored: the values of another adapter, by the live model's names; None where there is none to start from.
        copies: the values that it has of modules that train whole, by the live model's names, until they are given.
        initial: the factors that an adapter began with and the base is without, by the live model's names. A checkpoint
            that a run goes on from puts its own here before adapters are filled; else the first rank does then.
    """

    init: str
    seed: int
    stored: Mapping[str, Tensor] | None = None
    copies: dict[str, Tensor] = field(default_factory=dict)
    initial: dict[str, Tensor] = field(default_factory=dict)

    @property
    def changes_base(self) -> bool:
        return self.init != "default"

    def fill(self, model: PreTrainedModel, within: nn.Module | None = None) -> None:
        """Give adapters that are on the meta device their values, in the dtype of the base, and copies another's.

        What is drawn depends on the seed and the layer's name, and is made in float32, then rounded. What decomposes
        the base's weights is made by the first rank for all, since LAPACK's last bits depend on the processor. All
        ranks must ask, in the same order.

        Args:
            model: the base with its adapters; of what is filled, the base's own weights are there.
            within: the part of it; all if left out.
        """
        wanted = set((model if within is None else within).modules())
        dtype = model.dtype
        for name, layer in model.named_modules():
            if layer not in wanted:
                continue
            if hasattr(layer, "reset_lora_parameters") and factors(layer)[0].weight.is_meta:
                self._fill(name, layer, dtype)
            for key, parameter in layer._parameters.items():
                if (value := self.copies.pop(f"{BASE}{name}.{key}", None)) is not None:
                    cast(Tensor, parameter).data.copy_(value)

    def _fill(self, name: str, layer: Any, dtype: torch.dtype) -> None:
        pair = factors(layer)
        places = [f"{BASE}{name}.{factor}.default.weight" for factor in ("lora_A", "lora_B")]
        for matrix in pair:
            matrix.to_empty(device="cpu").float()
        known = self.stored if self.stored is not None else self.initial if self.changes_base else {}
        if places[0] in known:
            for matrix, place in zip(pair, places, strict=True):
                matrix.to(known[place].dtype).weight.data.copy_(known[place])
        elif self.changes_base:
            if ranks.is_first():
                self._decompose(name, layer)
            for matrix in pair:
                ranks.take_from_first(matrix.weight.data)
        else:
            with seeded(self.seed, name):
                layer.reset_lora_parameters("default", True)
        for matrix in pair:
            matrix.to(dtype)
        if self.changes_base:
            begun = {place: matrix.weight.detach().clone() for matrix, place in zip(pair, places, strict=True)}
            if ranks.is_first():  # which writes checkpoints
                self.initial |= begun
            base = layer.get_base_layer()
            base.weight.data = rest(base.weight, *begun.values(), scaling=layer.scaling["default"])
        self._fill_magnitude(name, layer)

    def _decompose(self, name: str, layer: Any) -> None:
        """Let peft take the factors from a copy of the base's weight, in float32."""
        base = layer.get_base_layer()
        own = base.weight
        base.weight = nn.Parameter(own.detach().to("cpu", torch.float32, copy=True), requires_grad=False)
        try:
            with seeded(self.seed, name), one_thread():
                if self.init == "olora":
                    layer.olora_init("default")
                else:
                    layer.pissa_init("default", self.init)
        finally:
            base.weight = own
        for matrix in factors(layer):
            matrix.weight.data = matrix.weight.data.contiguous()

    def _fill_magnitude(self, name: str, layer: Any) -> None:
        """DoRA's lengths of rows: another adapter's, or those of the matrix that base and adapter come to."""
        if (variant := layer.lora_variant.get("default")) is None:
            return
        with one_thread():
            variant.init(layer, adapter_name="default")
        if self.stored is not None:
            kept = self.stored[f"{BASE}{name}.lora_magnitude_vector.default.weight"]
            layer.lora_magnitude_vector["default"].weight.data.copy_(kept)


def rest(weight: Tensor, a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """What is left of a matrix without a product of two factors, ``[O, I]`` in its dtype, made in float32 at least.

    Args:
        weight: ``[O, I]``.
        a: the first factor, ``[R, I]``.
        b: the second, ``[O, R]``.
        scaling: of their product.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    with one_thread(), torch.no_grad():
        return (weight.to(wide) - scaling * (b.to(wide) @ a.to(wide))).to(weight.dtype)


# ---------------------------------------------------------------- as checkpoints have them


def changes_base(config: Any) -> bool:
    """Whether an adapter's configuration has it begin with a part of the base."""
    return isinstance(config.init_lora_weights, str)


def over_whole_base(config: Any) -> Any:
    """The configuration of an adapter with twice the rank and the same scale, over the base as it was."""
    doubled = copy(config)
    factor = 2**0.5 if config.use_rslora else 2
    doubled.init_lora_weights = True
    doubled.r, doubled.lora_alpha = 2 * config.r, factor * config.lora_alpha
    doubled.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    doubled.alpha_pattern = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}
    return doubled


def with_initial(name: str, trained: Tensor, initial: Mapping[str, Tensor]) -> Tensor:
    """A factor as a checkpoint has it, beside the one that it began with; what is no factor as it is."""
    if name not in initial:
        return trained
    begun = initial[name].to(trained.device)
    return torch.cat([trained, begun]) if _is_first(name) else torch.cat([trained, -begun], dim=1)


def split_initial(saved: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was trained, and the factors it began with, of the tensors of a checkpoint; see :func:`with_initial`.

    Raises:
        UserError: a rank that is odd.
    """
    trained, initial = {}, {}
    for name, tensor in saved.items():
        if ".lora_A." not in name and ".lora_B." not in name:
            trained[name] = tensor
            continue
        dim = 0 if _is_first(name) else 1
        if tensor.shape[dim] % 2:
            raise UserError(f"{name} has an odd rank: it was not saved with this model.lora.init.")
        own, begun = (half.contiguous() for half in tensor.chunk(2, dim))
        trained[name], initial[name] = own, begun if dim == 0 else -begun
    return trained, initial


def _is_first(name: str) -> bool:
    return ".lora_A." in name
