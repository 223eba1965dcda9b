"""Frozen weights held in the half precision that autocast would convert them to in every step.

Autocast keeps what it converts for trained weights alone; a frozen one is converted anew in every forward pass, and the
result is kept for the backward pass. Held in that type from the start, the weight is what products see anyway.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from mft_lightning.model.adapters import has_adapters
from mft_lightning.model.product_dtype import computes_bfloat16
from mft_lightning.model.supervised_loss import SupervisedLM


def hold_as_multiplied(network: SupervisedLM, product: torch.dtype, device: str) -> None:
    """Convert a network's :func:`only_multiplied` layers, which then computes under autocast what it did before.

    Args:
        network: with its values; without autocast it can no longer be computed.
        product: the type that autocast computes matrix products in.
        device: the kind that it will be on.
    """
    for linear in only_multiplied(network, device):
        linear.to(product)


def only_multiplied(network: SupervisedLM, device: str) -> list[nn.Linear]:
    """Frozen linear layers of a GPT-NeoX with adapters whose weights autocast alone reads.

    None are, where DoRA takes the norms of weights in full precision, where a CPU would be slow at bfloat16 and the
    head computes in float32 (``product_dtype.py``), or where another model may do more with a layer than call it. A
    head that is tied to the embeddings stays as these are.

    Args:
        network: of a run, before a strategy shards it.
        device: "cpu" or "cuda".
    """
    lm = network.causal_lm
    if not has_adapters(network.model) or lm.config.model_type != "gpt_neox":
        return []
    if cast(Any, network.model).peft_config["default"].use_dora or (device == "cpu" and not computes_bfloat16()):
        return []
    tables = {id(module.weight) for module in lm.modules() if isinstance(module, nn.Embedding)}
    return [
        module
        for module in lm.modules()
        if type(module) is nn.Linear and not module.weight.requires_grad and id(module.weight) not in tables
    ]
