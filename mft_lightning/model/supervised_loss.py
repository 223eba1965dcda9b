"""From a micro-batch to each conversation's NLL: backbone, head and loss in one forward, logits only where needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mft_lightning.data.collate import MicroBatch
from mft_lightning.model.adapters import has_adapters
from mft_lightning.model.attention import packed_row_arguments
from mft_lightning.model.buffers import unsaved_buffers_kept
from mft_lightning.model.head_loss import head_loss
from mft_lightning.model.last_layer import is_shortened, shorten_last_layer
from mft_lightning.model.logit_buffer import LogitBuffer
from mft_lightning.model.objective import Objective
from mft_lightning.model.product_dtype import product_dtype
from mft_lightning.model.quantized import gather_scales
from mft_lightning.model.vocabulary_parallel import VocabularyPart, is_shared
from mft_lightning.model.whole_modules import in_force

# bytes of a chunk's logits as they are computed, by device (benchmarks/head_loss.py)
LOGIT_BUDGETS = {"cpu": 128 * 2**20}
LOGIT_BUDGET = 256 * 2**20  # of all others, not yet run on a GPU


class SupervisedNLL(NamedTuple):
    """Sums over the supervised tokens of each of ``C`` conversations.

    A tuple, because wrappers of a module look for the tensors in its output.

    Attributes:
        loss: each token's objective times its conversation's factor, added up; differentiable, ``[]``.
        nll: summed negative log-likelihood, ``[C]``, at least float32, no gradient.
        correct: supervised tokens that were the most likely one, ``int64 [C]``.
    """

    loss: Tensor
    nll: Tensor
    correct: Tensor


class SupervisedLM(nn.Module):
    """A causal language model whose forward gives the loss of supervised tokens.

    The head sees the hidden states that predict a supervised token and no others, in chunks of ``logit_budget`` bytes
    of logits; a loss needs up to a few times that, whatever the vocabulary, the length and the batch.

    Args:
        model: a transformers causal LM, or one wrapped by peft.
        objective: what is minimised of a token.
        logit_budget: bytes of a chunk's logits. Default: by the device.
        keep_logits: let the memory for a chunk last from step to step, which is faster on a CPU (``LogitBuffer``).
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective = Objective(),  # noqa: B008  # never written
        logit_budget: int | None = None,
        keep_logits: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        shorten_last_layer(self.causal_lm)
        self.objective = objective
        self.logit_budget = logit_budget
        self._logits = LogitBuffer() if keep_logits else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As Lightning's bf16-true casts the weights, and strategies move them."""
        with unsaved_buffers_kept(self):
            super()._apply(fn, recurse)
        gather_scales(self)
        return self

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model itself, adapters included, without peft's wrapper."""
        inner = self.model.get_base_model() if has_adapters(self.model) else self.model
        return cast(PreTrainedModel, inner)

    def forward(self, micro: MicroBatch, weigh: Callable[[MicroBatch], Tensor] | None = None) -> SupervisedNLL:
        """Losses of a micro-batch.

        Args:
            micro: the conversations.
            weigh: tells what each conversation's summed objective counts, ``[C]``; 1 if it is left out. A function,
                because a tensor would be rounded by wrappers that cast what a module is given to half precision.
        """
        conversations = len(micro.tasks)
        if not len(micro.targets):  # a rank without work
            loss = _no_loss(self._head(self.hidden_states(micro)))
            return SupervisedNLL(loss, loss.new_zeros(conversations), micro.tasks.new_zeros(conversations))
        hidden = self.predictor_states(micro)
        factors = torch.ones_like(micro.tasks, dtype=torch.float32) if weigh is None else weigh(micro)
        per_token = factors[micro.conversation]
        how = (self.objective, self._rows(hidden), self._logits)
        losses = head_loss(self._head, hidden, micro.targets, per_token, *how)
        return SupervisedNLL(
            losses.loss,
            losses.nll.new_zeros(conversations).index_add(0, micro.conversation, losses.nll),
            losses.correct.new_zeros(conversations).index_add(0, micro.conversation, losses.correct),
        )

    def generate(self, **arguments: Any) -> Tensor:
        """transformers' ``generate``, as a forward of this module: a sharded network gathers its weights for it."""
        return cast(Any, self.model).generate(**arguments)

    def logits(self, micro: MicroBatch) -> Tensor:
        """The head's output at the micro-batch's predictors, ``[P, vocabulary]``, as the loss sees it."""
        return self._head(self.predictor_states(micro))

    @property
    def _head(self) -> nn.Module:
        return in_force(cast(nn.Module, self.causal_lm.get_output_embeddings()))

    def predictor_states(self, micro: MicroBatch) -> Tensor:
        """The backbone's last hidden states at the micro-batch's predictors, ``[P, hidden]``."""
        if is_shortened(self.causal_lm):
            return self.hidden_states(micro, needed=micro.predictors)[0]
        return self.hidden_states(micro).flatten(0, 1).index_select(0, micro.predictors)

    def hidden_states(self, micro: MicroBatch, **more: Any) -> Tensor:
        """The backbone's last hidden states, ``[B, T, hidden]``.

        ``use_cache=False`` is not about memory alone: with a cache, transformers no longer sees that a row is packed
        and conversations attend to each other.

        Args:
            micro: the conversations.
            more: keywords for the backbone's layers.
        """
        backbone = self.causal_lm.base_model
        return backbone(
            input_ids=micro.input_ids,
            position_ids=micro.position_ids,
            use_cache=False,
            **packed_row_arguments(self.causal_lm, micro.packed_lengths, micro.input_ids),
            **more,
        ).last_hidden_state

    def _rows(self, hidden: Tensor) -> int:
        """Tokens whose logits stand in memory at once, of as many tokens of the vocabulary as are on this device."""
        budget = self.logit_budget or LOGIT_BUDGETS.get(hidden.device.type, LOGIT_BUDGET)
        head: Any = self._head
        shared = is_shared(head)
        width = VocabularyPart.of(head.weight).count if shared else self.causal_lm.config.get_text_config().vocab_size
        return max(1, budget // (product_dtype(hidden).itemsize * width))


def _no_loss(logits: Tensor) -> Tensor:
    """Zero, with a graph through every weight: other ranks wait for the gradients of all of them."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).sum() * 0
