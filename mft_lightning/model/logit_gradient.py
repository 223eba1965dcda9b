"""Logits that turn into their own gradient, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from mft_lightning.model.objective import Objective
from mft_lightning.model.vocabulary_parallel import LogitSums, VocabularyPart

BLOCK = 128  # numbers of a row


def turn_into_gradient(
    logits: Tensor, targets: Tensor, factors: Tensor, objective: Objective, vocabulary: VocabularyPart
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits ``[P, V]`` into the gradient of ``sum_p factor_p * objective_p`` by them, in place.

    Args:
        logits: in any type; what is computed of them is in at least float32.
        targets: ``int64 [P, 1]``, of the whole vocabulary.
        factors: ``[P, 1]``.
        objective: of each token.
        vocabulary: the part of it that the logits are of.

    Returns:
        NLL, objective, and whether the target was the likeliest token, each ``[P]``.
    """
    places, target_here = vocabulary.places(targets)
    scores = logits.to(factors.dtype)
    own, probability = _normalised(scores, places, objective)
    own = own._replace(of_target=own.of_target * target_here)
    sums = vocabulary.over_all(own)
    log_total = sums.highest + sums.total.log()
    nll = log_total - sums.of_target
    value = objective.of(nll, log_total - sums.added / vocabulary.size, log_total)
    slope = objective.slope(nll, log_total, factors, vocabulary.size)
    share = own.total / sums.total * (own.highest - sums.highest).exp()
    gradient = probability.mul_(slope.probability * share).scatter_add_(1, places, slope.target * target_here)
    if slope.every is not None:
        gradient.add_(slope.every)
    logits.copy_(gradient)
    return nll[:, 0], value[:, 0], (sums.likeliest == targets)[:, 0]


def _normalised(logits: Tensor, targets: Tensor, objective: Objective) -> tuple[LogitSums, Tensor]:
    """Logits ``[P, V]`` in short, and their softmax.

    Args:
        logits: of the vocabulary, or a part of it.
        targets: ``int64 [P, 1]``.
        objective: tells whether their sum is needed; else anything stands for it.
    """
    likeliest = argmax(logits)
    highest, of_target = logits.gather(1, likeliest), logits.gather(1, targets)
    added = logits.sum(-1, keepdim=True) if objective.label_smoothing else of_target
    probability = logits.softmax(-1)
    total = probability.gather(1, likeliest).reciprocal()  # of exp(logit - highest), which is 1 at the likeliest
    return LogitSums(highest, likeliest, total, of_target, added), probability


def argmax(logits: Tensor) -> Tensor:
    """Places of the highest of each row of ``[P, V]``, the first of several, ``[P, 1]``.

    A CPU finds the highest number of a block some ten times as fast as its place.
    """
    blocks = logits.shape[-1] // BLOCK
    if logits.device.type != "cpu" or blocks < 2:
        return logits.argmax(-1, keepdim=True)
    whole, rest = logits.split([blocks * BLOCK, logits.shape[-1] - blocks * BLOCK], dim=-1)
    whole = whole.unflatten(-1, (blocks, BLOCK))
    block = whole.amax(-1).argmax(-1, keepdim=True)
    inside = whole.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1)
    place = block * BLOCK + inside.argmax(-1, keepdim=True)
    if not rest.shape[-1]:
        return place
    after = rest.argmax(-1, keepdim=True)
    return torch.where(rest.gather(1, after) > logits.gather(1, place), after + blocks * BLOCK, place)
