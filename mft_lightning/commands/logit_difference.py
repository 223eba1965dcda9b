"""How far apart the logits of two models are, on a few prompts in the form in which a model is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mft_lightning.commands.loading import LoadedModel
from mft_lightning.data.records import Turn
from mft_lightning.model.quantized import gather_scales

PROMPTS = (
    "Write a function that returns the larger of two numbers.",
    "What does this code do?\n\nfor number in range(3):\n    print(number * number)",
    "A train leaves at 9:40 and arrives at 11:05. How many minutes does the journey take?",
)


@dataclass(frozen=True)
class LogitDifference:
    """Of two models over the same tokens.

    Attributes:
        largest: of all tokens of the vocabulary at all positions.
        mean: over the same.
        positions: how many there were.
    """

    largest: float
    mean: float
    positions: int


def logit_difference(
    first: Callable[[], LoadedModel], second: Callable[[], LoadedModel], device: torch.device
) -> LogitDifference:
    """Measure it; the two models are in memory one after the other.

    Args:
        first: loads the one.
        second: loads the other, of the same tokenizer.
        device: that computes.
    """
    ours, theirs = _logits(first(), device), _logits(second(), device)
    apart = (ours - theirs).abs()
    return LogitDifference(float(apart.max()), float(apart.mean()), len(apart))


def _logits(loaded: LoadedModel, device: torch.device) -> Tensor:
    """Those of every position of every prompt, one below the other, in float32."""
    gather_scales(loaded.model.to(device))
    prompts = [loaded.chat_format.encode_prompt((Turn("human", text),)) for text in PROMPTS]
    with torch.no_grad():
        found = [loaded.model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in prompts]
    return torch.cat(found)
