"""The groups of keys below ``model`` that say what trains: adapters, quantisation."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from mft_lightning.errors import UserError, nearest
from mft_lightning.words import check_words

INITS = ("default", "pissa", "pissa_niter_16", "olora")  # and pissa_niter_ of another number


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
        use_rslora: multiply by alpha / sqrt(r) instead.
        use_dora: train the length of each row of a matrix apart from its direction, which the adapter turns.
        init: how adapters start: "default" (they change nothing), or with a part of the base's matrices, which the base
            is then without: "pissa" (the largest singular values), "pissa_niter_16" (the same, found faster in so many
            iterations), "olora" (the first rows of a QR decomposition).
        rank_pattern: ranks of layers that have another, by the end of their name or a regular expression for it. Of
            several that match, the first in alphabetical order.
        alpha_pattern: the same for alpha.
        loraplus_lr_ratio: LoRA+: how many times the learning rate of an adapter's first factor its second one has.
        start_from: directory of an adapter, a checkpoint or any of peft's, from whose weights a new run starts. What it
            says of its shape (r, alpha, target_modules, modules_to_save, use_rslora, use_dora, the patterns) holds for
            the run.
    """

    r: int = 96
    alpha: float = 32
    dropout: float = 0.05
    target_modules: list[str] | None = None
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "default"
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    loraplus_lr_ratio: float | None = None
    start_from: str | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"model.lora.r: {self.r} is less than 1.")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"model.lora.alpha: {self.alpha} is no number above 0.")
        if self.target_modules is not None and not self.target_modules:
            raise UserError("model.lora.target_modules: is empty. Leave it out for GPT-NeoX's four.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.lora.dropout: {self.dropout} is not in [0, 1).")
        if not re.fullmatch(r"default|pissa(_niter_\d+)?|olora", self.init):
            raise UserError(f"model.lora.init: {self.init!r} is none of {', '.join(INITS)}.{nearest(self.init, INITS)}")
        if self.changes_base and self.dropout:
            raise UserError(
                f"model.lora.init: with {self.init} adapters hold the largest part of the base, whose inputs dropout "
                "would drop. Set model.lora.dropout: 0."
            )
        if self.changes_base and self.start_from is not None:
            raise UserError(
                f"model.lora.init: is {self.init}, but model.lora.start_from says what adapters start with."
            )
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern, value in (getattr(self, key) or {}).items():
                _check_pattern(f"model.lora.{key}", pattern, value, least=1 if key == "rank_pattern" else 0)
        if self.loraplus_lr_ratio is not None and not 1 <= self.loraplus_lr_ratio < math.inf:
            raise UserError(f"model.lora.loraplus_lr_ratio: {self.loraplus_lr_ratio} is no number from 1 on.")

    @property
    def changes_base(self) -> bool:
        """Whether adapters start with a part of the base, which the base is then without."""
        return self.init != "default"

    @property
    def peft_init(self) -> str | bool:
        """What peft calls ``init``."""
        return self.init if self.changes_base else True


def _check_pattern(key: str, pattern: str, value: float, *, least: int) -> None:
    """One entry of a pattern: an expression, and a rank (``least`` 1) or a scale above 0."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is no regular expression ({error}).") from error
    if not least <= value < math.inf or value == 0:
        what = f"less than {least}" if least else "no number above 0"
        raise UserError(f"{key}: {pattern!r} has {value}, which is {what}.")


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
        check_words("model.qlora", type(self), vars(self))
        if self.bits == 4:
            return
        for key, default in (("quant_type", "nf4"), ("double_quant", True), ("compute_dtype", None)):
            if getattr(self, key) != default:
                raise UserError(f"model.qlora.{key}: is of 4 bits, but model.qlora.bits is 8. Leave it out.")

    def resolved(self, product_dtype: Any) -> QLoraSettings:
        """With the dtype that 4 bits are computed in, where it was left open."""
        if self.bits == 8 or self.compute_dtype or product_dtype == "float64":  # which check_quantizable refuses
            return self
        return replace(self, compute_dtype=product_dtype)
