"""From a micro-batch to each conversation's NLL: backbone, head and loss in one forward, logits only where needed."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mft_lightning.data.collate import MicroBatch
from mft_lightning.model.adapters import has_adapters
from mft_lightning.model.attention import packed_row_arguments

LOGIT_BUDGET = 512 * 2**20  # bytes of float32 logits that may stand in memory at once


class SupervisedNLL(NamedTuple):
    """Sums over the supervised tokens of each of ``C`` conversations.

    A tuple, because wrappers of a module look for the tensors in its output.

    Attributes:
        nll: summed negative log-likelihood, ``[C]``, at least float32, differentiable.
        correct: supervised tokens that were the most likely one, ``int64 [C]``.
    """

    nll: Tensor
    correct: Tensor


class SupervisedLM(nn.Module):
    """A causal language model whose forward gives the NLL of supervised tokens.

    The head sees the hidden states that predict a supervised token and no others, in chunks whose logits stay within
    ``logit_budget`` bytes; where more than one chunk is needed each is computed again in the backward pass, so that
    peak memory grows with neither vocabulary times length nor the batch.

    Args:
        model: a transformers causal LM, or one wrapped by peft.
        logit_budget: bytes of float32 logits in memory at once.
    """

    def __init__(self, model: nn.Module, logit_budget: int = LOGIT_BUDGET) -> None:
        super().__init__()
        self.model = model
        self.logit_budget = logit_budget

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model itself, adapters included, without peft's wrapper."""
        inner = self.model.get_base_model() if has_adapters(self.model) else self.model
        return cast(PreTrainedModel, inner)

    def forward(self, micro: MicroBatch) -> SupervisedNLL:
        hidden = self.hidden_states(micro)
        chosen = hidden.flatten(0, 1)[micro.predictors]
        conversations = len(micro.tasks)
        if not len(micro.targets):  # a rank without work
            return SupervisedNLL(
                _no_loss(self._head(hidden)) + hidden.new_zeros(conversations), micro.tasks.new_zeros(conversations)
            )
        nll, correct = self._token_nll(chosen, micro.targets)
        return SupervisedNLL(
            nll.new_zeros(conversations).index_add(0, micro.conversation, nll),
            correct.new_zeros(conversations).index_add(0, micro.conversation, correct),
        )

    def generate(self, **arguments: Any) -> Tensor:
        """transformers' ``generate``, as a forward of this module: a sharded network gathers its weights for it."""
        return cast(Any, self.model).generate(**arguments)

    def logits(self, micro: MicroBatch) -> Tensor:
        """The head's output at the micro-batch's predictors, ``[P, vocabulary]``, as the loss sees it."""
        return self._head(self.hidden_states(micro).flatten(0, 1)[micro.predictors])

    @property
    def _head(self) -> nn.Module:
        return cast(nn.Module, self.causal_lm.get_output_embeddings())

    def hidden_states(self, micro: MicroBatch) -> Tensor:
        """The backbone's last hidden states, ``[B, T, hidden]``.

        ``use_cache=False`` is not about memory alone: with a cache, transformers no longer sees that a row is packed
        and conversations attend to each other.
        """
        backbone = self.causal_lm.base_model
        return backbone(
            input_ids=micro.input_ids,
            position_ids=micro.position_ids,
            use_cache=False,
            **packed_row_arguments(self.causal_lm, micro.packed_lengths, micro.input_ids),
        ).last_hidden_state

    def _token_nll(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """NLL and correctness of each target: ``[P, hidden], [P] -> [P], int64 [P]``."""
        rows = max(1, self.logit_budget // (4 * self.causal_lm.config.get_text_config().vocab_size))
        if len(targets) <= rows:
            return _head_nll(self._head, hidden, targets)
        parts = [
            checkpoint(_head_nll, self._head, hidden[i : i + rows], targets[i : i + rows], use_reentrant=False)
            for i in range(0, len(targets), rows)
        ]
        return torch.cat([nll for nll, _ in parts]), torch.cat([correct for _, correct in parts])


def _no_loss(logits: Tensor) -> Tensor:
    """Zero, with a graph through every weight: other ranks wait for the gradients of all of them."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).sum() * 0


def _head_nll(head: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits, targets, reduction="none")
    return nll, (logits.detach().argmax(-1) == targets).long()
