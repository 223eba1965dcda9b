"""Answers to encoded prompts, by transformers' ``generate``: batches padded on the left, each answer cut at its eos."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from mft_lightning.errors import UserError
from mft_lightning.model.adapters import has_adapters
from mft_lightning.model.drawing import conversation_seed, drawn_alone
from mft_lightning.model.parallel import is_sharded
from mft_lightning.model.supervised_loss import SupervisedLM
from mft_lightning.ranks import highest

LEAST_TEMPERATURE = 1e-3  # logits are divided by it; much less makes them infinite

# Settings that the original's page recommends, by name; what a preset does not name is as without it.
PRESETS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "code": {"temperature": 0.1, "top_p": 0.95},
}


@dataclass(kw_only=True)
class GenerationSettings:
    """How answers are searched or drawn.

    Args:
        max_new_tokens: most tokens of an answer; fewer where the model's positions end.
        temperature: 0 takes the likeliest token every time; above, tokens are drawn.
        top_p: draw among the likeliest tokens that together have this probability.
        top_k: draw among so many of the likeliest tokens; 0 among all.
        repetition_penalty: above 1, tokens that were there before become less likely.
        num_beams: answers that are followed side by side; 1 follows one. Nothing is drawn then.
        seed: of what is drawn at a temperature above 0; an answer depends on it and on its conversation alone.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    seed: int = 42

    def __post_init__(self) -> None:
        for key, least in (("max_new_tokens", 1), ("top_k", 0), ("num_beams", 1)):
            if getattr(self, key) < least:
                raise UserError(f"{key}: {getattr(self, key)} is less than {least}.")
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(f"temperature: {self.temperature} is neither 0 nor a number from {LEAST_TEMPERATURE:g} on.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is no number above 0 and at most 1.")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(f"repetition_penalty: {self.repetition_penalty} is no number from 0.01 to 100; 1 is none.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed: {self.seed} is no number from 0 to 2^32 - 1.")
        if self.num_beams > 1 and self.temperature > 0:
            raise UserError(
                f"num_beams: {self.num_beams} searches for the likeliest answer, and temperature {self.temperature} "
                "draws one. Set one of the two."
            )
        if self.temperature == 0:
            for key, without in (("top_p", 1.0), ("top_k", 0)):
                if getattr(self, key) != without:
                    raise UserError(
                        f"{key}: {getattr(self, key)} has no effect at temperature 0, where nothing is drawn. "
                        "Set temperature too."
                    )

    def generation_config(self, limit: int, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """In transformers' words, for at most ``limit`` tokens; everything else is as without any setting."""
        return GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,  # what is drawn is drawn by `processors`
            num_beams=self.num_beams,
            repetition_penalty=float(self.repetition_penalty),  # transformers takes no int
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    def processors(self, prompts: Sequence[Sequence[int]]) -> LogitsProcessorList:
        """What draws the tokens of a batch; nothing at temperature 0."""
        if self.temperature == 0:
            return LogitsProcessorList()
        seeds = [conversation_seed(self.seed, prompt) for prompt in prompts]
        return drawn_alone(seeds, temperature=float(self.temperature), top_k=self.top_k, top_p=self.top_p)


@dataclass(frozen=True)
class Answer:
    """The ids of an answer without its eos; ``finished`` if the model ended it, not the limit."""

    ids: list[int]
    finished: bool


def room(model: Any, prompt: Sequence[int]) -> int | None:
    """Tokens that the model's positions leave after ``prompt``; None where they have no end."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None else positions - len(prompt)


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], settings: GenerationSettings
) -> list[Answer]:
    """Answer encoded prompts as one batch.

    Shorter prompts are padded on the left, masked, so that each gets the answer that it gets alone, up to rounding.

    Args:
        model: a transformers or peft causal LM in evaluation mode.
        tokenizer: its eos token ends an answer.
        prompts: ids of each, at least one token and at least one position less than the model has.
        settings: how to search or draw.

    Returns:
        An answer for each prompt, in order.
    """
    with torch.inference_mode():
        return _answer(model, model.generate, tokenizer, prompts, settings)


def answer_together(
    network: SupervisedLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
) -> list[Answer]:
    """Answer this rank's prompts with a network that is sharded over the ranks; all of them must call this at once.

    Every forward gathers weights, so every rank takes as many as the one with the most to do.

    Args:
        network: sharded, in evaluation mode.
        tokenizer: as for :func:`answer`.
        prompts: of this rank, possibly none.
        settings: as for :func:`answer`.
    """

    def generate(**arguments: Any) -> Tensor:
        return network.generate(**arguments, synced_gpus=True)

    with torch.no_grad():  # weights that are gathered under inference_mode cannot train afterwards
        return _answer(network.model, generate, tokenizer, prompts, settings, more=lambda rest: bool(highest(rest)))


def answer_on_ranks(
    network: SupervisedLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
) -> list[Answer]:
    """Answers to this rank's prompts, possibly none; every rank must call this as often as the others."""
    if is_sharded(network):
        return answer_together(network, tokenizer, prompts, settings)
    return answer(network.model, tokenizer, prompts, settings) if prompts else []


def _answer(
    model: Any,
    generate: Callable[..., Tensor],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    more: Callable[[int], bool] = bool,
) -> list[Answer]:
    """Round after round, while ``more`` of them are open; a longer prompt may leave those beside it too little room."""
    limits = []
    for prompt in prompts:
        left = room(model, prompt)
        limits.append(settings.max_new_tokens if left is None else min(settings.max_new_tokens, left))
    answers: list[Answer] = [Answer([], False)] * len(prompts)
    open_ended = settings.num_beams > 1  # with more room a beam may end better that ends already
    asked = list(range(len(prompts)))
    while more(len(asked)):
        limit = min((limits[i] for i in asked), default=1)
        batch = [prompts[i] for i in asked] or [[tokenizer.eos_token_id]]  # another rank is not done yet
        found = answer_within(limit, model, generate, tokenizer, batch, settings)
        for i, given in zip(asked, found, strict=False):
            answers[i] = given
        asked = [i for i in asked if limits[i] > limit and (open_ended or not answers[i].finished)]
    return answers


def answer_within(
    limit: int,
    model: Any,
    generate: Callable[..., Tensor],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
) -> list[Answer]:
    """Answers of at most ``limit`` tokens to a batch of prompts, by ``generate``, the model's own or around it."""
    width = max(len(prompt) for prompt in prompts)
    pad: Any = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = settings.generation_config(limit, tokenizer)
    with _alone_in_force(config, model):
        output = generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=config,
            logits_processor=settings.processors(prompts),
        )
    return [_cut(ids, tokenizer.eos_token_id) for ids in output[:, width:].tolist()]


@contextmanager
def _alone_in_force(config: GenerationConfig, model: Any) -> Iterator[None]:
    """transformers takes whatever ``config`` leaves open from the model's own, peft gives its base its own for good."""
    holders = [model, model.get_base_model()] if has_adapters(model) else [model]
    own = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = config
        yield
    finally:
        for holder, kept in zip(holders, own, strict=True):
            holder.generation_config = kept


def _cut(ids: list[int], eos: Any) -> Answer:
    return Answer(ids[: ids.index(eos)], True) if eos in ids else Answer(ids, False)
