"""Draws of tokens in which every conversation has a generator of its own, so that none depends on those beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def conversation_seed(seed: int, prompt: Sequence[int]) -> int:
    """The seed of one conversation's draws, ``0 … 2^32 - 1``, of ``seed`` and the ids of its prompt."""
    said = f"{seed} {' '.join(map(str, prompt))}"
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:4], "little")


class DrawnAlone(LogitsProcessor):
    """Draws a token for every conversation, and leaves it the only one that can be taken.

    transformers draws for a batch as a whole. From here a conversation gets what it would be given alone after
    ``torch.manual_seed`` of its own seed.

    Args:
        seeds: of each conversation of the batch.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = seeds
        self._generators: list[torch.Generator] = []  # made where the logits are

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        if not self._generators:
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        pairs = zip(scores.softmax(-1), self._generators, strict=True)
        drawn: Tensor = torch.stack([torch.multinomial(row, 1, generator=own) for row, own in pairs])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)  # type: ignore[return-value]  # a Tensor


def drawn_alone(seeds: Sequence[int], *, temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    """What narrows the draw, in the order of transformers' own sampling, and the draw."""
    steps: list[LogitsProcessor] = []
    if temperature != 1:
        steps.append(TemperatureLogitsWarper(temperature))
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    return LogitsProcessorList([*steps, DrawnAlone(seeds)])
