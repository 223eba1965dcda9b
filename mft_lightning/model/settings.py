"""The groups of keys below ``model`` that say what trains: adapters, quantisation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from mft_lightning.errors import NotYetError, UserError


@dataclass(kw_only=True)
class LoraSettings:
    """Low-rank adapters (``model.peft_type: lora``); the original's fixed values are the defaults.

    Args:
        r: rank.
        alpha: scale; the adapter's output is multiplied by alpha / r.
        dropout: on the adapter's input.
        target_modules: names of the linear layers that get an adapter. Default: GPT-NeoX's four.
        modules_to_save: names of layers of which a copy trains whole and is saved beside the adapters. Default:
            embeddings and head where tokens are new to the base (data.role_tokens: added, or more tokens than rows),
            else none. [] is none.
        use_rslora: not supported yet.
        use_dora: not supported yet.
        init: how the adapter starts; only "default" (it changes nothing) is supported yet.
    """

    r: int = 96
    alpha: float = 32
    dropout: float = 0.05
    target_modules: list[str] | None = None
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "default"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"model.lora.r: {self.r} is less than 1.")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"model.lora.alpha: {self.alpha} is no number above 0.")
        if self.target_modules is not None and not self.target_modules:
            raise UserError("model.lora.target_modules: is empty. Leave it out for GPT-NeoX's four.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.lora.dropout: {self.dropout} is not in [0, 1).")
        for key in ("use_rslora", "use_dora"):
            if getattr(self, key):
                raise NotYetError(f"model.lora.{key}", True, "Leave it out.")
        if self.init != "default":
            raise NotYetError("model.lora.init", self.init, "Leave it out.")


@dataclass(kw_only=True)
class QLoraSettings:
    """4-bit and 8-bit base weights (``model.peft_type: qlora``), by bitsandbytes.

    Args:
        bits: 4 or 8. The keys below are of 4 bits.
        quant_type: nf4 or fp4.
        double_quant: quantise the scales too.
        compute_dtype: of matrix products with the base's weights. Default: what trainer.precision computes in.
    """

    bits: Literal[4, 8] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None

    def __post_init__(self) -> None:
        if self.bits == 4:
            return
        for key, default in (("quant_type", "nf4"), ("double_quant", True), ("compute_dtype", None)):
            if getattr(self, key) != default:
                raise UserError(f"model.qlora.{key}: is of 4 bits, but model.qlora.bits is 8. Leave it out.")

    def resolved(self, product_dtype: Any) -> QLoraSettings:
        """With the dtype that 4 bits are computed in, where it was left open."""
        return self if self.bits == 8 or self.compute_dtype else replace(self, compute_dtype=product_dtype)
