"""The loss of a language model's head, a chunk of tokens at a time, so that few logits stand in memory at once.

The factor of every token is known before its logits are, so a linear head's gradients are made on the way forward:
each chunk's logits turn into their own gradient in place, and are computed once. Another head (one with adapters) is
computed again on the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mft_lightning.model.logit_buffer import LogitBuffer
from mft_lightning.model.logit_gradient import turn_into_gradient
from mft_lightning.model.objective import Objective
from mft_lightning.model.product_dtype import product_dtype
from mft_lightning.model.vocabulary_parallel import VocabularyPart, is_shared

# bytes of float32 logits that are worked on at a time (benchmarks/head_loss.py)
CACHED = 2**20  # by each core of a CPU
PIECE = 64 * 2**20  # by another device, not yet run on a GPU
# a CPU's products of half-precision matrices take up to 1.4 times as long with other numbers of rows
ROWS_TOGETHER = 64
ROWS_WITHOUT_WEIGHT = 256  # of a chunk of such, where the weight has no gradient: more are not faster
ROWS_ADDED = 4096  # of a weight's gradient
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
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    factors: Tensor,
    objective: Objective,
    rows: int,
    buffer: LogitBuffer | None = None,
) -> TokenLosses:
    """The weighted loss of a head's logits, reduced in at least float32.

    Args:
        head: hidden states to logits; one whose rows are shared out over devices gives each of them the whole loss.
        hidden: ``[P, hidden]``, what predicts each token.
        targets: ``int64 [P]``, the tokens.
        factors: ``[P]``, what each counts.
        objective: of each.
        rows: tokens whose logits stand in memory at once.
        buffer: for the logits of a linear head. Default: one for this call.
    """
    if is_shared(head) or _is_plain(head):
        linear = cast(nn.Linear, head)
        weight, bias, vocabulary = _here(linear.weight), _here(linear.bias), VocabularyPart.of(linear.weight)
        learns = torch.is_grad_enabled()  # of which autograd's context knows nothing
        given = (targets, factors, objective, rows, vocabulary, learns, buffer or LogitBuffer())
        return TokenLosses(*_LinearHeadLoss.apply(hidden, weight, bias, *given))
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
        learns: bool,
        buffer: LogitBuffer,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = product_dtype(hidden)
        kind, reduced = hidden.device.type, _reduced_in(dtype)
        of_hidden, of_weight, of_bias = (learns and needed for needed in ctx.needs_input_grad[:3])
        made = _Gradients(torch.empty_like(hidden) if of_hidden else None, of_weight, of_bias)
        factors = factors.to(reduced)
        ctx.unit = None
        if dtype == torch.float16:  # in which a factor of one in thousands leaves nothing of a gradient
            ctx.unit = factors.abs().amax().clamp_min(torch.finfo(reduced).tiny) / HALF_LARGEST
            factors = factors / ctx.unit
        halves_on_cpu = kind == "cpu" and dtype.itemsize == 2
        if halves_on_cpu and not of_weight:
            rows = min(rows, ROWS_WITHOUT_WEIGHT)
        together = min(rows, ROWS_TOGETHER if halves_on_cpu else 1)
        piece = rows if vocabulary.group is not None else cached_rows(kind, vocabulary.count)
        tokens = _Tokens(targets, factors, objective, vocabulary, piece)
        with torch.autocast(kind, enabled=False):
            matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            inputs = F.pad(hidden.to(dtype), (0, 0, 0, -len(targets) % together))
            for part in _even_parts(len(inputs), rows, together):
                logits = buffer.of(inputs[part], vocabulary.count)
                _multiply(inputs[part], matrix, offset, out=logits)
                tokens.turn_into_gradient(logits, part.start)
                made.add(part, logits, inputs[part], matrix)
                del logits  # before the next chunk has its own
            if made.of_hidden is not None:
                vocabulary.sum(made.of_hidden)
        ctx.made = made.finished(weight, bias)
        ctx.mark_non_differentiable(tokens.nll, tokens.correct)
        loss = (factors * tokens.value).sum(dtype=torch.float64).to(reduced)
        return (loss if ctx.unit is None else loss * ctx.unit), tokens.nll, tokens.correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.made is None:
            raise RuntimeError("the gradients of a head's loss are given away in its first backward pass")
        scale = grad_loss if ctx.unit is None else grad_loss * ctx.unit
        made, ctx.made = ctx.made, None
        return (*(None if one is None else one.mul_(scale) for one in made), *(None,) * 7)


class _Tokens:
    """What logits tell of tokens, each ``[P]``.

    ``nll``, ``value`` of the objective, and whether the likeliest token was the ``correct`` one.

    Args:
        targets: ``int64 [P]``, the tokens.
        factors: what each counts, ``[P]``, of the type that logits are reduced in.
        objective: of each.
        vocabulary: the part of it that logits are of.
        piece: tokens whose logits are worked on at a time.
    """

    def __init__(
        self, targets: Tensor, factors: Tensor, objective: Objective, vocabulary: VocabularyPart, piece: int
    ) -> None:
        self.nll, self.value, self.correct = (torch.empty_like(like) for like in (factors, factors, targets))
        self._targets, self._factors = targets[:, None], factors[:, None]
        self._known = (objective, vocabulary)
        self._piece = piece

    def turn_into_gradient(self, logits: Tensor, first: int) -> None:
        """Turn the logits of the tokens from ``first`` on into their gradient; rows after the last token become 0."""
        count = len(self.nll) - first
        logits[count:] = 0
        for some in logits[:count].split(self._piece):
            part = slice(first, first + len(some))
            told = turn_into_gradient(some, self._targets[part], self._factors[part], *self._known)
            self.nll[part], self.value[part], self.correct[part] = told
            first = part.stop


class _Gradients:
    """Those of a linear head's hidden states, weight and bias, from chunks of those of its logits.

    Args:
        of_hidden: where to write them; None for none.
        of_weight: whether they are wanted.
        of_bias: whether they are wanted.
    """

    def __init__(self, of_hidden: Tensor | None, of_weight: bool, of_bias: bool) -> None:
        self.of_hidden = of_hidden
        self._wanted = (of_weight, of_bias)
        self._sums: list[Tensor | None] = [None, None]

    def add(self, part: slice, of_logits: Tensor, inputs: Tensor, matrix: Tensor) -> None:
        """Take a chunk of tokens, and rows of zeros after the last; of several, sums are kept in at least float32."""
        if self.of_hidden is not None:
            of_inputs = of_logits @ matrix
            self.of_hidden[part] = of_inputs[: len(self.of_hidden) - part.start]
        of_weight, of_bias = self._sums
        reduced = _reduced_in(of_logits.dtype)
        if self._wanted[1]:
            summed = of_logits.sum(0, dtype=reduced)
            self._sums[1] = summed if of_bias is None else of_bias.add_(summed)
        if not self._wanted[0]:
            return
        if of_weight is None:
            self._sums[0] = of_logits.T @ inputs
        elif of_weight.dtype == of_logits.dtype == reduced:
            of_weight.addmm_(of_logits.T, inputs)
        else:
            self._sums[0] = _added(of_weight.to(reduced), of_logits.T @ inputs)

    def finished(self, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
        """All three, in the types of what they are gradients of."""
        found = [self.of_hidden]
        for of, wanted, total in zip((weight, bias), self._wanted, self._sums, strict=True):
            of_none = torch.zeros_like(of) if wanted and of is not None and total is None else None
            found.append(of_none if total is None or of is None else total.to(of.dtype))
        return found


def _added(total: Tensor, part: Tensor) -> Tensor:
    """A sum with a part of another type added in place, some rows at a time, as a CPU casts what it adds as a whole."""
    for some, more in zip(total.split(ROWS_ADDED), part.split(ROWS_ADDED), strict=True):
        some.add_(more)
    return total


def _even_parts(count: int, most: int, together: int) -> Iterator[slice]:
    """Parts of about equal length of ``count`` rows.

    Args:
        count: a multiple of ``together``.
        most: rows of a part, at least ``together``.
        together: what a part's rows, too, are a multiple of.
    """
    parts = max(1, -(-count // (most // together * together)))
    each = max(1, -(-count // parts))
    each += -each % together
    for start in range(0, count, each):
        yield slice(start, min(start + each, count))


def _multiply(inputs: Tensor, matrix: Tensor, offset: Tensor | None, out: Tensor) -> None:
    """``inputs @ matrix.T + offset``."""
    if offset is None:
        torch.mm(inputs, matrix.T, out=out)
    else:
        torch.addmm(offset, inputs, matrix.T, out=out)


def cached_rows(device: str, width: int) -> int:
    """Rows of ``width`` logits to work on at a time: as many as a CPU's cores have room for in their caches."""
    piece = CACHED * torch.get_num_threads() if device == "cpu" else PIECE
    return max(1, piece // (4 * width))


def _here(parameter: Tensor | None) -> Tensor | None:
    """What is on this device of a head's parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _is_plain(head: nn.Module) -> bool:
    """Whether a head is a matrix and a bias, and nobody asked to see it called."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(head) is nn.Linear and not any(getattr(head, name) for name in hooks)


def _reduced_in(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
