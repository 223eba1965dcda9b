"""The floating-point operations that a step of training needs, whatever is computed for it.

Counted are products of matrices: of a linear layer 2 for each weight and token forward, 2 for the gradient of its
input, and 2 for that of its weight where it trains; the head's for supervised tokens only, the others' for all tokens
but padding, although this program leaves out what it can of them: the last layer's MLP where nothing is predicted, and
the gradient of the first layer's input where nothing below it trains, together 3% of full fine-tuning and 5% of LoRA of
Pythia-70m. Attention is causal and within a conversation. What is computed for padding, what is computed twice
(activation checkpointing, weights brought back from 4 bits) and everything elementwise (norms, biases, dropout, the
loss, the optimizer) is not useful in this sense; embeddings are looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mft_lightning.model.quantized import whole_numel
from mft_lightning.model.whole_modules import in_force

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = 2, 2, 2  # operations for each weight and token
CAUSAL_SCORES = 2  # for each pair of tokens and column of queries: queries by keys, scores by values; half are masked
LINEAR = (nn.Linear, Conv1D)  # bitsandbytes' layers are the first, and so are both factors of an adapter


@dataclass(frozen=True)
class UsefulFlops:
    """Operations of a forward and backward pass, of the whole model, by what they grow with.

    Attributes:
        token: of each token that is no padding.
        supervised_token: of each supervised token besides.
        squared_length: of each conversation's length, squared.
    """

    token: int
    supervised_token: int
    squared_length: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Those of a model, by the shapes of its weights and by which of them train.

        Sliding windows of attention are taken for whole ones, and experts that are no linear layers are left out.

        Args:
            model: with its adapters and without peft's wrapper, not sharded by FSDP1 or DeepSpeed; no value is read.
        """
        head = set(in_force(cast(nn.Module, model.get_output_embeddings())).modules())
        token = supervised_token = 0
        for path, module in model.named_modules():
            if not isinstance(module, LINEAR) or "original_module" in path.split("."):  # a copy computes in its place
                continue
            if module in head:
                supervised_token += _linear(module)
            else:
                token += _linear(module)
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        return cls(token, supervised_token, 3 * CAUSAL_SCORES * width * config.num_hidden_layers)

    def of_step(self, tokens: int, supervised: int, squared_lengths: int) -> int:
        """Those of an optimizer step.

        Args:
            tokens: of its conversations.
            supervised: tokens among them.
            squared_lengths: the sum of the squares of the conversations' lengths in tokens.
        """
        return self.token * tokens + self.supervised_token * supervised + self.squared_length * squared_lengths


def _linear(layer: Any) -> int:
    trains = layer.weight.requires_grad
    return whole_numel(layer.weight) * (FORWARD + INPUT_GRADIENT + WEIGHT_GRADIENT * trains)
