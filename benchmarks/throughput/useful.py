"""The floating-point operations that a step of GPT-NeoX needs, by the shapes of its weights."""

from __future__ import annotations

from typing import Any


def step_flops(model: Any, lengths: list[int], supervised: int) -> float:
    config = model.config
    token = supervised_token = 0
    head = model.get_output_embeddings()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2 or module is model.get_input_embeddings():
            continue
        cost = weight.numel() * (4 + 2 * weight.requires_grad)
        if module is head:
            supervised_token += cost
        else:
            token += cost
    pairs = 6 * config.hidden_size * config.num_hidden_layers
    return token * sum(lengths) + supervised_token * supervised + pairs * sum(n * n for n in lengths)
