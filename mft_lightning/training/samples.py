"""Answers to read in TensorBoard: prompt, reference and answer of some held-out conversations of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import lightning as L
import torch

from mft_lightning.data.chat_encoder import ROLE_START
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.held_out import Held
from mft_lightning.model.generation import Answer
from mft_lightning.model.parallel import summed_over_data
from mft_lightning.training.exact_match import is_exact
from mft_lightning.training.markdown import fenced, plain

MOST_TOKENS = 256  # of a reference and an answer that are shown
MOST_OF_PROMPT = 512  # tokens, its last
CONTINUED = "\N{RIGHTWARDS ARROW WITH HOOK} "
COLUMNS = 96  # of a line; TensorBoard wraps none


@dataclass(frozen=True)
class Sample:
    """A prompt with its reference, the file and line it stands in, and the answer."""

    held: Held
    where: str
    given: Answer


def gathered(
    trainer: L.Trainer, device: torch.device, numbers: Sequence[int], answers: Mapping[int, Answer]
) -> dict[int, Answer]:
    """The answers that any rank has to the questions of these numbers, cut to what is shown; every rank must ask."""
    rows = torch.zeros(len(numbers), 2 + MOST_TOKENS, dtype=torch.int64, device=device)  # state, tokens, ids
    for row, number in zip(rows, numbers, strict=True):
        if number in answers:
            ids, finished = answers[number].ids[:MOST_TOKENS], answers[number].finished
            whole = finished and len(ids) == len(answers[number].ids)
            row[: 2 + len(ids)] = torch.tensor([1 + whole, len(ids), *ids])
    found = summed_over_data(trainer, rows).tolist()
    return {
        number: Answer(row[2 : 2 + row[1]], finished=row[0] == 2)
        for number, row in zip(numbers, found, strict=True)
        if row[0]
    }


def panels(chat_format: ChatFormat, samples: Sequence[Sample]) -> dict[int, str]:
    """The samples of each task, by its number, as Markdown."""
    by_task: dict[int, list[str]] = {}
    for sample in samples:
        found = by_task.setdefault(sample.held.task, [])
        found.append(_sample(chat_format, sample, len(found) + 1))
    return {task: "\n\n".join(found) for task, found in by_task.items()}


def wrapped(text: str) -> str:
    """Text whose long lines go on in the next, which begins with an arrow then."""
    lines = []
    for line in text.split("\n"):
        while len(line) > COLUMNS:
            end = line.rfind(" ", COLUMNS // 2, COLUMNS) + 1 or COLUMNS
            lines.append(line[:end])
            line = CONTINUED + line[end:]
        lines.append(line)
    return "\n".join(lines)


def _sample(chat_format: ChatFormat, sample: Sample, number: int) -> str:
    prompt, reference, given = sample.held.prompt, sample.held.reference, sample.given
    if is_exact(chat_format, given, reference):
        verdict = "the reference to the letter"
    else:
        verdict = "not the reference" if given.finished else f"not ended after {len(given.ids)} tokens"
    earlier = len(prompt) - MOST_OF_PROMPT
    turns = chat_format.decode(prompt[-MOST_OF_PROMPT:]).replace(ROLE_START, f"\n{ROLE_START}").removeprefix("\n")
    left = len(reference) - MOST_TOKENS
    shown = [
        f"#### {number}. {verdict}",
        "prompt" + (f", without its first {earlier:,} tokens" if earlier > 0 else "") + f", {plain(sample.where)}",
        fenced(wrapped(turns)),
        "reference" + (f", without its last {left:,} tokens" if left > 0 else ""),
        fenced(wrapped(chat_format.decode(reference[:MOST_TOKENS]))),
        "answer",
        fenced(wrapped(chat_format.decode(given.ids))) if given.ids else "(empty)",
    ]
    return "\n\n".join(shown)
