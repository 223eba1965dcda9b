"""Held-out prompts answered by the network in training: at validations a few to read, at the end those to count too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from mft_lightning import ranks
from mft_lightning.data.held_out import Held
from mft_lightning.data.place import data_parallel_place
from mft_lightning.model.generation import Answer, GenerationSettings, answer_on_ranks
from mft_lightning.model.module import MFTModule
from mft_lightning.model.parallel import summed_over_data
from mft_lightning.training.curves import Curves
from mft_lightning.training.exact_match import is_exact
from mft_lightning.training.progress import RunBar
from mft_lightning.training.questions import Question, questions
from mft_lightning.training.samples import MOST_TOKENS, Sample, gathered, panels
from mft_lightning.training.signals import GracefulStop
from mft_lightning.training.stages import find_callback, is_run_end

BATCH = 16  # prompts answered side by side, at most


class Asking(L.Callback):
    """Asks for samples at every validation of ``fit``, and counts exact answers when a command is done.

    At the end of ``fit`` what is asked for once serves both. A run that is told to stop by a signal asks no further;
    what was asked counts.

    Args:
        exact_per_task: conversations of each task whose answers are compared; all answers of a conversation count.
        samples_per_task: conversations of each task whose last answer is shown in TensorBoard.

    Attributes:
        counts: of each task, the exact answers and all that were asked for.
    """

    def __init__(self, exact_per_task: int, samples_per_task: int) -> None:
        self.exact_per_task, self.samples_per_task = exact_per_task, samples_per_task
        self.counts: dict[str, tuple[int, int]] = {}
        self._shown = -1  # the step of the last samples

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """In training, while the clock of the steps stands still; those of the last step come with the others."""
        at_end = trainer.global_step > 0 and is_run_end(trainer)
        if trainer.state.fn == TrainerFn.FITTING and self.samples_per_task and not at_end:
            self._ask(trainer, cast(MFTModule, pl_module), "valid", 0, self.samples_per_task)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        samples = self.samples_per_task if self._shown != trainer.global_step else 0
        self._ask(trainer, cast(MFTModule, pl_module), "valid", self.exact_per_task, samples)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._ask(trainer, cast(MFTModule, pl_module), "valid", self.exact_per_task, 0)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ask(trainer, cast(MFTModule, pl_module), "test", self.exact_per_task, 0)

    def _ask(self, trainer: L.Trainer, module: MFTModule, split: str, exact: int, samples: int) -> None:
        if not (exact or samples) or _told_to_stop(trainer):
            return
        asked = questions(module.datamodule, split, exact, samples)
        if trainer.is_global_zero and exact:
            print(f"answering {sum(question.counts for question in asked):,} held-out prompts", flush=True)
        longest = max((len(question.held.reference) for question in asked), default=0)
        limit = longest + 1 if exact else min(longest + 1, MOST_TOKENS)
        answers = _answers(trainer, module, [question.held for question in asked], limit)
        if exact:
            self._count(trainer, module, split, asked, answers)
        if samples:
            self._show(trainer, module, asked, answers)

    def _count(
        self,
        trainer: L.Trainer,
        module: MFTModule,
        split: str,
        asked: Sequence[Question],
        answers: dict[int, Answer],
    ) -> None:
        datamodule = module.datamodule
        counts = torch.zeros(2, len(datamodule.task_names), dtype=torch.float64, device=module.device)
        for number, given in answers.items():
            held = asked[number].held
            if asked[number].counts:
                counts[0, held.task] += is_exact(datamodule.chat_format, given, held.reference)
                counts[1, held.task] += 1
        exact, of_all = summed_over_data(trainer, counts).long().tolist()
        rows = zip(datamodule.task_names, exact, of_all, strict=True)
        self.counts = {name: (right, of) for name, right, of in rows if of}
        prefix = "test" if split == "test" else "val"
        shares = {f"{prefix}/exact_match/{name}": right / of for name, (right, of) in self.counts.items()}
        for logger in trainer.loggers if shares else ():
            logger.log_metrics(shares, step=trainer.global_step)

    def _show(
        self, trainer: L.Trainer, module: MFTModule, asked: Sequence[Question], answers: dict[int, Answer]
    ) -> None:
        """All ranks' answers, written by the first."""
        self._shown = trainer.global_step
        shown = [number for number, question in enumerate(asked) if question.shown]
        found = gathered(trainer, module.device, shown, answers)
        if not trainer.is_global_zero:
            return
        samples = [Sample(asked[n].held, asked[n].where, found[n]) for n in shown if n in found]
        for task, markdown in panels(module.datamodule.chat_format, samples).items():
            for logger in trainer.loggers:
                if isinstance(logger, Curves):
                    tag = f"answers/{module.datamodule.task_names[task]}"
                    logger.log_text(tag, markdown, trainer.global_step)


def _answers(trainer: L.Trainer, module: MFTModule, held: Sequence[Held], limit: int) -> dict[int, Answer]:
    """This rank's share of the answers, of at most ``limit`` tokens, by their places in ``held``."""
    network, datamodule = module.network, module.datamodule
    assert network is not None
    rank, world = data_parallel_place(trainer)
    mine = sorted(range(rank, len(held), world), key=lambda number: len(held[number].prompt))
    batches = _batches(mine, held, limit, datamodule.valid_batch_size * datamodule.policy.seq_length)
    training = network.training
    network.eval()
    bar = trainer.progress_bar_callback
    bar = bar if isinstance(bar, RunBar) else None
    if bar is not None:
        bar.start_part("answering", len(mine))
    answers: dict[int, Answer] = {}
    settings = GenerationSettings(max_new_tokens=limit)
    for turn in range(ranks.highest(len(batches))):
        if _told_to_stop(trainer):
            break
        batch = batches[turn] if turn < len(batches) else []
        with trainer.precision_plugin.forward_context():
            prompts = [held[number].prompt for number in batch]
            given = answer_on_ranks(network, datamodule.tokenizer, prompts, settings)
        answers |= dict(zip(batch, given, strict=True))
        if bar is not None:
            for _ in batch:
                bar.advance_part()
    if bar is not None:
        bar.end_part()
    network.train(training)
    return answers


def _batches(ordered: Sequence[int], held: Sequence[Held], limit: int, tokens: int) -> list[list[int]]:
    """Prompts in batches of at most ``tokens``, answers and padding included, as a validation's batch has."""
    batches: list[list[int]] = []
    for number in ordered:  # the longest of a batch is its last
        width = len(held[number].prompt) + limit
        if not batches or len(batches[-1]) == BATCH or (len(batches[-1]) + 1) * width > tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


def _told_to_stop(trainer: L.Trainer) -> bool:
    """Whether any rank was; all must ask, and all know then."""
    stop = find_callback(trainer, GracefulStop)
    if stop is None:
        return False
    stop.agree(trainer)
    return stop.received is not None
