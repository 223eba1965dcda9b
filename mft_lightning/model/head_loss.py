"""The loss of a language model's head, a chunk of tokens at a time, so that few logits stand in memory at once.

The factor of every token is known before its logits are, so a linear head's gradients are made on the way forward:
each chunk's logits turn into their own gradient in place, and are computed once. Another head (one with adapters) is
computed again on the way back.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mft_lightning.model.objective import Objective
from mft_lightning.model.vocabulary_parallel import LogitSums, VocabularyPart, is_shared

# the largest factor in float16: far above its smallest number, 6e-8, and a chunk's sum far below its largest, 65504
HALF_LARGEST = 1 / 16


class TokenLosses(NamedTuple):
    """Of ``P`` supervised tokens.

    Attributes:
        loss: ``sum_p factor_p * objective_p``, differentiable, ``[]``.
        nll: ``[P]``, at least float32, no gradient.
        correct: whether the token was the most likely one, ``int64 [P]``.
    """

    loss: Tensor
    nll: Tensor
    correct: Tensor


def head_loss(
    head: nn.Module, hidden: Tensor, targets: Tensor, factors: Tensor, objective: Objective, rows: int
) -> TokenLosses:
    """The weighted loss of a head's logits, reduced in at least float32.

    Args:
        head: hidden states to logits; one whose rows are shared out over devices gives each of them the whole loss.
        hidden: ``[P, hidden]``, what predicts each token.
        targets: ``int64 [P]``, the tokens.
        factors: ``[P]``, what each counts.
        objective: of each.
        rows: tokens whose logits stand in memory at once.
    """
    if is_shared(head) or (torch.is_grad_enabled() and _is_plain(head)):
        linear = cast(nn.Linear, head)
        weight, bias, vocabulary = _here(linear.weight), _here(linear.bias), VocabularyPart.of(linear.weight)
        return TokenLosses(*_LinearHeadLoss.apply(hidden, weight, bias, targets, factors, objective, rows, vocabulary))
    parts = []
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        inputs = (head, hidden[part], targets[part], factors[part], objective)
        again = torch.is_grad_enabled() and len(targets) > rows
        parts.append(checkpoint(_chunk, *inputs, use_reentrant=False) if again else _chunk(*inputs))
    losses, nll, correct = zip(*parts, strict=True)
    return TokenLosses(torch.stack(losses).sum(), torch.cat(nll), torch.cat(correct))


def _chunk(
    head: nn.Module, hidden: Tensor, targets: Tensor, factors: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    logits = head(hidden)
    logits = logits.to(_reduced_in(logits.dtype))
    nll = F.cross_entropy(logits, targets, reduction="none")
    log_total = logits.logsumexp(-1) if objective.z_loss else nll
    mean = -logits.log_softmax(-1).mean(-1) if objective.label_smoothing else nll
    loss = (factors.to(nll.dtype) * objective.of(nll, mean, log_total)).sum()
    return loss, nll.detach(), (logits.detach().argmax(-1) == targets).long()


class _LinearHeadLoss(torch.autograd.Function):
    """``TokenLosses`` of a linear head; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        factors: Tensor,
        objective: Objective,
        rows: int,
        vocabulary: VocabularyPart,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        if kind == "cpu" and dtype == torch.bfloat16 and not computes_bfloat16():
            dtype = torch.float32
        reduced = _reduced_in(dtype)
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        made = [
            torch.empty_like(hidden) if of_hidden else None,
            torch.zeros_like(weight, dtype=reduced) if of_weight else None,
            torch.zeros_like(weight[:, 0], dtype=reduced) if of_bias else None,
        ]
        factors = factors.to(reduced)
        ctx.unit = None
        if dtype == torch.float16:  # in which a factor of one in thousands leaves nothing of a gradient
            ctx.unit = factors.abs().amax().clamp_min(torch.finfo(reduced).tiny) / HALF_LARGEST
            factors = factors / ctx.unit
        nll = torch.empty(len(targets), dtype=reduced, device=hidden.device)
        value, correct = torch.empty_like(nll), torch.empty_like(targets)
        with torch.autocast(kind, enabled=False):
            matrix = weight.to(dtype)
            for start in range(0, len(targets), rows):
                part = slice(start, start + rows)
                inputs, wanted = hidden[part].to(dtype), targets[part, None]
                logits = F.linear(inputs, matrix, None if bias is None else bias.to(dtype)).to(reduced)
                places, target_here = vocabulary.places(wanted)
                own = _exponentiate(logits, places, objective)
                own = own._replace(of_target=own.of_target * target_here)
                sums = vocabulary.over_all(own)
                log_total = sums.highest + sums.total.log()
                nll[part] = (log_total - sums.of_target)[:, 0]
                mean_nll = (log_total - sums.added / vocabulary.size)[:, 0]
                value[part] = objective.of(nll[part], mean_nll, log_total[:, 0])
                correct[part] = (sums.likeliest == wanted)[:, 0]
                slope = objective.slope(nll[part, None], log_total, factors[part, None], vocabulary.size)
                probability = slope.probability / sums.total * (own.highest - sums.highest).exp()
                gradient = logits.mul_(probability).scatter_add_(1, places, slope.target * target_here)
                if slope.every is not None:
                    gradient.add_(slope.every)
                _accumulate(made, part, gradient, inputs, matrix)
                del logits, gradient  # before the next chunk has its own
            if made[0] is not None:
                vocabulary.sum(made[0])
        as_given = (hidden.dtype, weight.dtype, weight.dtype)
        ctx.made = [None if one is None else one.to(dtype) for one, dtype in zip(made, as_given, strict=True)]
        ctx.mark_non_differentiable(nll, correct)
        loss = (factors * value).sum(dtype=torch.float64).to(reduced)
        return (loss if ctx.unit is None else loss * ctx.unit), nll, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.made is None:
            raise RuntimeError("the gradients of a head's loss are given away in its first backward pass")
        scale = grad_loss if ctx.unit is None else grad_loss * ctx.unit
        made, ctx.made = ctx.made, None
        return (*(None if one is None else one.mul_(scale) for one in made), None, None, None, None, None)


def _exponentiate(logits: Tensor, targets: Tensor, objective: Objective) -> LogitSums:
    """Turn logits ``[P, V]`` into exponentials of what each is above the highest, in place; what they were, in short.

    Args:
        logits: become the exponentials.
        targets: ``int64 [P, 1]``.
        objective: tells whether their sum is needed; else anything stands for it.
    """
    highest, likeliest = logits.max(-1, keepdim=True)
    of_target = logits.gather(1, targets)
    added = logits.sum(-1, keepdim=True) if objective.label_smoothing else of_target
    return LogitSums(highest, likeliest, logits.sub_(highest).exp_().sum(-1, keepdim=True), of_target, added)


def _accumulate(made: list[Tensor | None], part: slice, gradient: Tensor, inputs: Tensor, matrix: Tensor) -> None:
    """Add a chunk's gradient ``[rows, vocabulary]`` to those of hidden states, weight and bias."""
    of_hidden, of_weight, of_bias = made
    if of_bias is not None:
        of_bias.add_(gradient.sum(0))
    gradient = gradient.to(inputs.dtype)
    if of_hidden is not None:
        of_hidden[part] = gradient @ matrix
    if of_weight is None:
        return
    if of_weight.dtype == inputs.dtype:
        of_weight.addmm_(gradient.T, inputs)
    else:
        of_weight.add_(gradient.T @ inputs)


def computes_bfloat16() -> bool:
    """Whether this CPU has instructions for it; matrix products are some thirty times slower than float32's if not."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _here(parameter: Tensor | None) -> Tensor | None:
    """What is on this device of a head's parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _is_plain(head: nn.Module) -> bool:
    """Whether a head is a matrix and a bias, and nobody asked to see it called."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(head) is nn.Linear and not any(getattr(head, name) for name in hooks)


def _reduced_in(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
