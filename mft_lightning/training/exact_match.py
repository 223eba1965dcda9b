"""Exact match: the share of greedy answers, on a sample of each task, that are the reference to the letter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from mft_lightning import ranks
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.held_out import Held, held_at, whole_answers
from mft_lightning.data.place import data_parallel_place
from mft_lightning.errors import UserError
from mft_lightning.model.generation import Answer, GenerationSettings, answer_on_ranks
from mft_lightning.model.module import MFTModule
from mft_lightning.model.parallel import summed_over_data
from mft_lightning.training.evaluation import EvaluationSettings
from mft_lightning.training.progress import RunBar
from mft_lightning.training.signals import GracefulStop
from mft_lightning.training.stages import find_callback

BATCH = 16  # prompts answered side by side


def check_exact_match(settings: EvaluationSettings, datamodule: MFTDataModule) -> None:
    """Refuse to compare answers where there are none.

    Raises:
        UserError: in pretraining.
    """
    if settings.exact_match_per_task is not None and datamodule.chat_format.pretrain:
        raise UserError(
            "evaluation.exact_match_per_task: data.tokenize_mode pretrain has no answers to compare. Leave it out."
        )


def held_answers(datamodule: MFTDataModule, split: str, per_task: int) -> Iterator[Held]:
    """Every answer of at most ``per_task`` conversations of each task; each is asked after its true history."""
    table, eos = datamodule.table(split), datamodule.chat_format.eos_token_id
    for index in datamodule.evaluated(split, per_task).tolist():
        for start, end in whole_answers(table, index, eos):
            yield held_at(table, index, start, end)


def is_exact(chat_format: ChatFormat, given: Answer, reference: Sequence[int]) -> bool:
    """Whether an answer is the reference to the letter, and the model ended it."""
    return given.finished and chat_format.decode(given.ids) == chat_format.decode(reference)


class ExactMatch(L.Callback):
    """Asks the trained model at the end of ``fit``, ``validate`` and ``test``.

    A run that is told to stop by a signal asks no further; what was asked counts.

    Args:
        per_task: conversations of each task; all answers of a conversation count.

    Attributes:
        counts: of each task, the exact answers and all that were asked for.
    """

    def __init__(self, per_task: int) -> None:
        self.per_task = per_task
        self.counts: dict[str, tuple[int, int]] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not _told_to_stop(trainer):
            self._measure(trainer, cast(MFTModule, pl_module), "valid")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._measure(trainer, cast(MFTModule, pl_module), "valid")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure(trainer, cast(MFTModule, pl_module), "test")

    def _measure(self, trainer: L.Trainer, module: MFTModule, split: str) -> None:
        datamodule, network = module.datamodule, module.network
        assert network is not None
        held = list(held_answers(datamodule, split, self.per_task))
        settings = GenerationSettings(max_new_tokens=max((len(h.reference) for h in held), default=0) + 1)
        rank, world = data_parallel_place(trainer)
        mine = sorted(held[rank::world], key=lambda h: len(h.prompt))
        counts = torch.zeros(2, len(datamodule.task_names), dtype=torch.float64, device=module.device)
        if trainer.is_global_zero:
            print(f"answering {len(held):,} held-out prompts", flush=True)
        training = network.training
        network.eval()
        bar = trainer.progress_bar_callback
        bar = bar if isinstance(bar, RunBar) else None
        if bar is not None:
            bar.start_part("answering", len(mine))
        batches = [mine[start : start + BATCH] for start in range(0, len(mine), BATCH)]
        for turn in range(ranks.highest(len(batches))):
            if _told_to_stop(trainer):
                break
            batch = batches[turn] if turn < len(batches) else []
            with trainer.precision_plugin.forward_context():
                found = answer_on_ranks(network, datamodule.tokenizer, [h.prompt for h in batch], settings)
            for h, given in zip(batch, found, strict=True):
                counts[0, h.task] += is_exact(datamodule.chat_format, given, h.reference)
                counts[1, h.task] += 1
                if bar is not None:
                    bar.advance_part()
        if bar is not None:
            bar.end_part()
        network.train(training)
        exact, asked = summed_over_data(trainer, counts).long().tolist()
        rows = zip(datamodule.task_names, exact, asked, strict=True)
        self.counts = {name: (right, of) for name, right, of in rows if of}
        prefix = "test" if split == "test" else "val"
        shares = {f"{prefix}/exact_match/{name}": right / of for name, (right, of) in self.counts.items()}
        for logger in trainer.loggers if shares else ():
            logger.log_metrics(shares, step=trainer.global_step)


def _told_to_stop(trainer: L.Trainer) -> bool:
    """Whether any rank was; all must ask, and all know then."""
    stop = find_callback(trainer, GracefulStop)
    if stop is None:
        return False
    stop.agree(trainer)
    return stop.received is not None
