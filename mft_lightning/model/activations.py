"""What a GPT-NeoX layer keeps of its forward pass for its backward pass, tensor by tensor.

Autograd keeps the inputs of what it must differentiate; a tensor that two operations keep, or two views of it, counts
once. The names are those of transformers' ``GPTNeoXLayer``, in the order of its forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

STATISTIC = 4  # bytes of a norm's mean or deviation, and of attention's log-sum-exp


@dataclass(frozen=True, kw_only=True)
class Computation:
    """How a layer computes.

    Attributes:
        stream: bytes of an element of the residual stream, which norms read.
        product: bytes of an element of a matrix product's result.
        adapter: bytes of an element of an adapter's weight.
        device: "cpu", where dropout keeps factors of the type it multiplies, or "cuda", where it keeps booleans.
        norms_cast: whether each norm keeps a float32 copy of the stream for itself.
        rows: that attention sees side by side.
        length: tokens of such a row; attention that is not fused computes a score for each pair of them.
        blocked: whether attention is that of ``blocked_attention.py``.
    """

    stream: int
    product: int
    adapter: int
    device: str
    norms_cast: bool
    rows: int
    length: int
    blocked: bool = False


def kept_by_layer(layer: nn.Module, config: PretrainedConfig, how: Computation) -> dict[str, float]:
    """Bytes per token that a layer keeps, by tensor.

    Args:
        layer: a ``GPTNeoXLayer``, with or without adapters; no weight is read.
        config: of its model.
        how: it computes.
    """
    parts: Any = layer
    attention, mlp = parts.attention, parts.mlp
    hidden, inner, product = config.hidden_size, mlp.dense_h_to_4h.out_features, how.product
    norms = 2
    kept: dict[str, float] = {
        "hidden_states": hidden * (4 * norms if how.norms_cast else how.stream),
        "mean and deviation of the norms": 2 * norms * STATISTIC,
        "input of query_key_value": _linear_input(attention.query_key_value, how),
        **_attention(attention.query_key_value.out_features // 3, config, how),
        "input of dense": _linear_input(attention.dense, how),
        "input of dense_h_to_4h": _linear_input(mlp.dense_h_to_4h, how),
        "in the activation function": inner * product * saved_tensors(mlp.act),
        "input of dense_4h_to_h": _linear_input(mlp.dense_4h_to_h, how),
    }
    if not config.use_parallel_residual:
        kept["attn_output + hidden_states"] = hidden * (4 if how.norms_cast else how.stream)
    if config.hidden_dropout:
        kept["masks of two dropouts"] = 2 * hidden * _mask(how, product)
    return kept


def _attention(width: int, config: PretrainedConfig, how: Computation) -> dict[str, float]:
    """What attention keeps beside its linear layers' inputs, in bytes per token.

    Args:
        width: of the queries that are here: those of all heads, or of this device's.
        config: of the model.
        how: the layer computes.
    """
    heads, product = heads_within(width, config), how.product
    if how.blocked:
        return {"query, key, value": 3 * width * product}
    dropout = bool(config.attention_dropout)
    pairs = heads * how.length
    kept: dict[str, float] = {"query, key, value": 3 * width * product, "rotated query, key": 2 * width * product}
    eager = config._attn_implementation == "eager"
    unfused = eager or (dropout and how.device == "cpu")  # scaled_dot_product_attention has no fused dropout there
    if unfused and how.rows > 1:  # value is copied out of what query_key_value gave
        kept["query, key, value"] = width * product
    if eager:
        kept["attention weights in float32"] = pairs * 4
        if product != 4 or dropout:
            kept["attention weights"] = pairs * product
        if dropout:
            kept["mask of attention_dropout"] = pairs * _mask(how, product)
        return kept
    if unfused:
        return {**kept, "attention weights, their mask, both multiplied": 3 * pairs * product}
    return {**kept, "output of attention": width * product, "log-sum-exp of the scores": heads * STATISTIC}


def heads_within(width: int, config: PretrainedConfig) -> int:
    """Attention heads whose queries are so wide together."""
    return width * config.num_attention_heads // config.hidden_size


def _linear_input(linear: Any, how: Computation) -> float:
    """What a linear layer with or without an adapter keeps of its input, in bytes per token."""
    if not hasattr(linear, "lora_A"):
        return linear.in_features * how.product if linear.weight.requires_grad else 0
    rank = linear.lora_A["default"].out_features
    kept = (linear.in_features + rank) * how.product
    if isinstance(linear.lora_dropout["default"], nn.Dropout):
        kept += linear.in_features * _mask(how, how.adapter)
    return kept


def _mask(how: Computation, own: int) -> int:
    """Bytes of an element of a dropout's mask.

    Args:
        how: the layer computes.
        own: bytes of an element of what is dropped.
    """
    return 1 if how.device == "cuda" else own


def saved_tensors(function: nn.Module) -> int:
    """Tensors that an elementwise function keeps, tried out on one: ``gelu`` its input, its approximations several."""
    found: dict[int, Tensor] = {}  # held, so that no two have the same memory

    def pack(tensor: Tensor) -> Tensor:
        if tensor.ndim:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.device("cpu"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(torch.zeros(8, requires_grad=True))
    return len(found)
