"""A last layer that computes its MLP only where a prediction counts.

Attention before it needs the keys and values of all tokens; after it only the head reads on, and that reads what
predicts a supervised token and nothing else.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gpt_neox import modeling_gpt_neox


class GPTNeoXLayer(modeling_gpt_neox.GPTNeoXLayer):
    """transformers' layer, and named so, as whoever shards or saves a model knows its layers by their name."""

    def forward(self, hidden_states: Any, *args: Any, needed: Tensor | None = None, **kwargs: Any) -> Tensor:
        """What the layer gives at some tokens.

        Args:
            hidden_states: ``[B, T, hidden]``.
            args: as transformers' layer takes them.
            needed: ``int64 [P]``, flat places in ``[B * T]``; all of them where it is left out.
            kwargs: as transformers' layer takes them.

        Returns:
            ``[1, P, hidden]``, or ``[B, T, hidden]`` where ``needed`` is left out.
        """
        if needed is None:
            return cast(Tensor, super().forward(hidden_states, *args, **kwargs))
        attended, _ = self.attention(self.input_layernorm(hidden_states), *args, **kwargs)
        attended, hidden_states = (
            states.flatten(0, 1).index_select(0, needed)[None] for states in (attended, hidden_states)
        )
        attended = self.post_attention_dropout(attended)
        if self.use_parallel_residual:
            gained: Tensor = self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
            return gained + attended + hidden_states
        attended = attended + hidden_states
        gained = self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(attended)))
        return gained + attended


def shorten_last_layer(model: PreTrainedModel) -> None:
    """Let a GPT-NeoX's last layer know ``needed``; other models stay as they are."""
    if model.config.model_type == "gpt_neox":
        layers = cast(nn.ModuleList, model.base_model.layers)
        if type(layers[-1]) is modeling_gpt_neox.GPTNeoXLayer:
            layers[-1].__class__ = GPTNeoXLayer


def is_shortened(model: PreTrainedModel) -> bool:
    """Whether a model's last layer knows ``needed``."""
    return isinstance(getattr(model.base_model, "layers", [None])[-1], GPTNeoXLayer)
