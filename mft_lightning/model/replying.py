"""One answer that is told while it comes, and that can be stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextStreamer

from mft_lightning.model.generation import Answer, GenerationSettings, answer_within, room


class _Told(TextStreamer):
    """Hands on the words of an answer as they are complete, without its eos."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, clean_up_tokenization_spaces=False)
        self.tell, self.eos = tell, tokenizer.eos_token_id

    def put(self, value: Tensor) -> None:
        if self.next_tokens_are_prompt or value.tolist() != [self.eos]:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.tell(text)


class _Stopped(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.stopped(), dtype=torch.bool, device=input_ids.device)


def reply(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    settings: GenerationSettings,
    *,
    tell: Callable[[str], None],
    stopped: Callable[[], bool],
) -> Answer:
    """Answer one encoded prompt.

    Args:
        model: a transformers or peft causal LM in evaluation mode.
        tokenizer: its eos token ends the answer.
        prompt: at least one token and at least one position less than the model has.
        settings: how to search or draw. An answer that is searched among several is told when it is found.
        tell: is given the text, piece by piece.
        stopped: asked after every token whether it is to be the last.
    """
    left = room(model, prompt)
    limit = settings.max_new_tokens if left is None else min(settings.max_new_tokens, left)
    stopping = StoppingCriteriaList([_Stopped(stopped)])
    streamer = _Told(tokenizer, tell) if settings.num_beams == 1 else None  # transformers streams no beams
    generate = partial(model.generate, stopping_criteria=stopping, streamer=streamer)
    with torch.inference_mode():
        (found,) = answer_within(limit, model, generate, tokenizer, [prompt], settings)
    if streamer is None:
        tell(str(tokenizer.decode(found.ids, clean_up_tokenization_spaces=False)))
    return found
