"""Exact match: an answer is the reference to the letter, or it is not."""

from __future__ import annotations

from collections.abc import Sequence

from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.model.generation import Answer


def is_exact(chat_format: ChatFormat, given: Answer, reference: Sequence[int]) -> bool:
    """Whether an answer is the reference to the letter, and the model ended it."""
    return given.finished and chat_format.decode(given.ids) == chat_format.decode(reference)
