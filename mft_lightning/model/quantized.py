"""The frozen base in 4 or 8 bits, by bitsandbytes: a sketch's layers replaced, given their values, and read back.

All linear layers are quantised, one after the other, but the head and those that train whole beside adapters; these,
embeddings and norms stay as they are. That is done in host memory, so that a base has the same bits whatever device it
trains on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import fields
from importlib.util import find_spec
from math import ceil
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from mft_lightning.errors import UserError, first_line
from mft_lightning.model.generation_file import saved_generation_config
from mft_lightning.model.settings import QLoraSettings
from mft_lightning.model.weights import StoredWeights, Weights, filled, materialise, sketch

KEY = "model.qlora."
FLOAT32 = 4  # bytes of a scale
BLOCKS = 256  # whose scales have a scale of their own under double quantisation


def check_quantizable(settings: QLoraSettings, dtype: torch.dtype) -> None:
    """Refuse what cannot be quantised, without reading any weights.

    Args:
        settings: of the quantisation.
        dtype: of the base's weights before it.

    Raises:
        UserError: bitsandbytes is not installed, or does not know the dtype.
    """
    require_bitsandbytes("model.peft_type: qlora")
    if dtype == torch.float64:
        raise UserError(
            f"trainer.precision: 64-true is too much for {settings.bits} bits, which bitsandbytes reads in 32 at most. "
            "Use 32-true."
        )


def has_bitsandbytes() -> bool:
    return find_spec("bitsandbytes") is not None


def require_bitsandbytes(what: str) -> None:
    """Say what to install where bitsandbytes is not.

    Args:
        what: needs it, for the message.

    Raises:
        UserError: it is not there.
    """
    if not has_bitsandbytes():
        raise UserError(
            f'{what}: needs bitsandbytes, which is not installed. Install it with pip install -e ".[qlora]" -c '
            "constraints.txt."
        )


def quantize(model: PreTrainedModel, settings: QLoraSettings, whole: Collection[str] = ()) -> None:
    """Give a sketch, in place, layers whose values will be quantised when they come.

    Args:
        model: on the meta device, without adapters.
        settings: with a ``compute_dtype`` where there are 4 bits.
        whole: names of modules that train whole beside adapters, as peft looks for them; they stay as they are.
    """
    from transformers.integrations import replace_with_bnb_linear  # which imports bitsandbytes

    if settings.bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.quant_type,
            bnb_4bit_use_double_quant=settings.double_quant,
            bnb_4bit_compute_dtype=settings.compute_dtype,
        )
    kept = [path for path, _ in model.named_modules() if path.endswith(tuple(whole))]
    replace_with_bnb_linear(model, get_keys_to_not_convert(model) + kept, quantization_config=config)
    setattr(model, f"is_loaded_in_{settings.bits}bit", True)  # by which peft knows it
    if settings.bits == 8:
        from mft_lightning.model.eight_bits import WeightOnlyLinear8bit  # which imports bitsandbytes

        for layer in eight_bit_layers(model):
            layer.__class__ = WeightOnlyLinear8bit
    for layer in model.modules():
        # On a CPU with bfloat16 instructions the first evaluation would round a layer's scales for good, and no
        # gradient would pass through it any more (bitsandbytes 0.50.2, Linear4bit.forward: packing_format_for_cpu).
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def quantized_causal_lm(
    path: str, dtype: torch.dtype, settings: QLoraSettings, where: str, whole: Collection[str] = ()
) -> tuple[PreTrainedModel, Weights]:
    """A saved base as a run with these settings quantises it, and its weights before that.

    Args:
        path: of a model directory or hub id.
        dtype: of the base's weights before it, and of what is not quantised.
        settings: of the quantisation.
        where: what an error says of the base.
        whole: names of modules that trained whole, which are not quantised.

    Raises:
        UserError: the base cannot be read, or bitsandbytes is not installed.
    """
    require_bitsandbytes(where)
    try:
        model = sketch(AutoConfig.from_pretrained(path), dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be loaded ({first_line(error)}).") from error
    model.generation_config = saved_generation_config(path, where) or model.generation_config
    weights = StoredWeights(deepcopy(model), dtype, path, where=where)
    quantize(model, settings, whole)
    materialise_quantized(model, weights)
    return model, weights


def materialise_quantized(model: PreTrainedModel, weights: Weights) -> None:
    """Give a sketch with :func:`quantize`'s layers its values; one module's are whole in memory at a time.

    Args:
        model: with or without adapters.
        weights: of the base before it is quantised.
    """
    materialise(model, weights)
    for layer in eight_bit_layers(model):
        layer.init_8bit_state()


def gather_scales(module: nn.Module) -> None:
    """Bring the scales of 8-bit layers to where their weights were moved to with the module.

    A ``Linear8bitLt`` does so only where it is moved itself, and not with what it is part of
    (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1332).
    """
    for layer in eight_bit_layers(module):
        if layer.state.SCB is not None:
            layer.state.CB = layer.weight.data
            layer.state.SCB = layer.state.SCB.to(layer.weight.device)


def eight_bit_layers(module: nn.Module) -> list[Any]:
    """Linear layers whose weight has 8 bits, below adapters too."""
    return [layer for layer in module.modules() if type(layer._parameters.get("weight")).__name__ == "Int8Params"]


def whole_numel(parameter: nn.Parameter) -> int:
    """The elements of a weight, of which two are a byte where they have 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def held_bytes(parameter: nn.Parameter) -> int:
    """Bytes of a weight of a sketch with its scales, as it will be held."""
    kind, numel = type(parameter).__name__, parameter.numel()
    if kind == "Int8Params":
        return numel + FLOAT32 * len(parameter)  # a scale for each row
    if kind != "Params4bit":
        return numel * parameter.element_size()
    blocks = ceil(numel / cast(Any, parameter).blocksize)
    doubly = cast(Any, parameter).compress_statistics
    return ceil(numel / 2) + (blocks + FLOAT32 * ceil(blocks / BLOCKS) if doubly else FLOAT32 * blocks)


def dequantized_bytes(linear: Any, before: int, product: int) -> int:
    """Bytes that a backward pass through a linear layer needs of its weight, in full; none where it is not quantised.

    Args:
        linear: with or without an adapter.
        before: bytes of an element before it was quantised, to which 4 bits are brought back first.
        product: bytes of an element as it is computed in.
    """
    weight = getattr(linear, "base_layer", linear).weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        return weight.numel() * sum({before, product})
    return weight.numel() * product if kind == "Int8Params" else 0


class DequantizedWeights(Weights):
    """Weights as a quantised base computes with them: those of its quantised layers there and back again.

    Args:
        weights: before they are quantised.
        settings: of :func:`quantize`.
        whole: likewise.
    """

    def __init__(self, weights: Weights, settings: QLoraSettings, whole: Collection[str] = ()) -> None:
        super().__init__(weights.model, weights.dtype)
        self.weights = weights
        self._quantized = deepcopy(weights.model)
        quantize(self._quantized, settings, whole)

    def of(self, name: str) -> dict[str, Tensor]:
        return {key: self._there_and_back(name, key, value) for key, value in self.weights.of(name).items()}

    def __getitem__(self, name: str) -> Tensor:
        module, _, key = name.rpartition(".")
        return self._there_and_back(module, key, self.weights[name])

    def _there_and_back(self, module: str, key: str, value: Tensor) -> Tensor:
        sketched = self._quantized.get_submodule(module)._parameters.get(key)
        if sketched is None or type(sketched) is nn.Parameter:
            return value
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # which imports bitsandbytes

        quantized = filled(sketched, value)
        return dequantize_bnb_weight(quantized, SimpleNamespace(SCB=getattr(quantized, "SCB", None))).to(self.dtype)


def described(settings: QLoraSettings | None) -> dict[str, Any]:
    """A quantisation by its keys, as a checkpoint tells of it; None for what is not there."""
    there = {} if settings is None else {"bits": settings.bits} if settings.bits == 8 else vars(settings)
    return {KEY + field.name: there.get(field.name) for field in fields(QLoraSettings)}


def settings_of(description: Mapping[str, Any]) -> QLoraSettings | None:
    """The quantisation that a checkpoint tells of (``fingerprint`` of its ``checkpoint.json``), if any."""
    given = {field.name: description.get(KEY + field.name) for field in fields(QLoraSettings)}
    there = {name: value for name, value in given.items() if value is not None}
    return QLoraSettings(**there) if there else None
