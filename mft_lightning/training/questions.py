"""Which held-out prompts are asked in training: the same at every validation and on every layout."""

from __future__ import annotations

from dataclasses import dataclass

from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.held_out import Held, held_at, whole_answers
from mft_lightning.errors import UserError
from mft_lightning.training.evaluation import EvaluationSettings

MANY_TASKS = 20  # more of them are not sampled unless it is asked for


@dataclass(frozen=True)
class Question:
    """A prompt with its reference.

    Attributes:
        held: both.
        where: the file and line that it stands in.
        counts: whether its answer counts among those that are compared.
        shown: whether its answer is shown.
    """

    held: Held
    where: str
    counts: bool
    shown: bool


def check_questions(settings: EvaluationSettings, datamodule: MFTDataModule) -> None:
    """Refuse to ask where there are no answers.

    Raises:
        UserError: in pretraining.
    """
    for key in ("exact_match_per_task", "samples_per_task"):
        if getattr(settings, key) and datamodule.chat_format.pretrain:
            raise UserError(f"evaluation.{key}: data.tokenize_mode pretrain has no answers to compare. Leave it out.")


def samples_per_task(settings: EvaluationSettings, datamodule: MFTDataModule) -> int:
    """How many conversations of each task are sampled at validations, where nothing else is in the way."""
    if settings.samples_per_task is not None:
        return settings.samples_per_task
    return int(len(datamodule.tasks) <= MANY_TASKS and not datamodule.chat_format.pretrain)


def questions(datamodule: MFTDataModule, split: str, exact_per_task: int, samples_per_task: int) -> list[Question]:
    """Every answer of some conversations of each task to count, and the last answers of some to show.

    Each is asked after its true history. An answer that was truncated is left out, as nobody knows its end.

    Args:
        datamodule: draws the conversations by its seed.
        split: ``valid`` or ``test``.
        exact_per_task: at most so many conversations of each task whose answers count.
        samples_per_task: at most so many of each task whose last answer is shown.
    """
    table, eos = datamodule.table(split), datamodule.chat_format.eos_token_id
    counted, sampled = (
        set(datamodule.evaluated(split, number).tolist()) for number in (exact_per_task, samples_per_task)
    )
    found = []
    for index in sorted(counted | sampled):
        answers = list(whole_answers(table, index, eos))
        file, line = table.where(index)[0]
        for start, end in answers:
            counts, shown = index in counted, index in sampled and (start, end) == answers[-1]
            if counts or shown:
                found.append(Question(held_at(table, index, start, end), f"{file}:{line}", counts, shown))
    return found
