"""``trainer.predict``'s answers, compared with the references and kept as they come."""

from __future__ import annotations

from typing import Any, cast

import lightning as L

from mft_lightning import ranks
from mft_lightning.bars import WorkBar
from mft_lightning.data.held_out import NOTHING
from mft_lightning.data.place import data_parallel_place
from mft_lightning.model.generation import Answer
from mft_lightning.model.module import MFTModule
from mft_lightning.training.answer_parts import AnswerParts, PartWriter
from mft_lightning.training.exact_match import is_exact


class KeepAnswers(L.Callback):
    """Writes every batch of answers to its rank's part as soon as it is there, and waits for all ranks at the end.

    Args:
        parts: where.
        bar: whether to show how far it is.
    """

    def __init__(self, parts: AnswerParts, *, bar: bool) -> None:
        self.parts, self.shows_bar = parts, bar
        self._writer: PartWriter | None = None
        self._bar: WorkBar | None = None
        self._done = 0

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        questions = cast(MFTModule, pl_module).datamodule.questions
        rank, world = data_parallel_place(trainer)
        if trainer.global_rank % getattr(trainer.strategy, "sharing", 1) == 0:  # else it answers the same as another
            self._writer = self.parts.writer(rank)
        if trainer.is_global_zero and self.shows_bar:
            share = [number for number in questions.share(rank, world) if number != NOTHING]
            noun = "answers" if world == 1 else "answers of the first process"
            self._bar = WorkBar("answering", sum(len(questions.batches[number]) for number in share), noun)
            self._bar.__enter__()

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: int, *args: Any
    ) -> None:
        if batch == NOTHING:
            return
        datamodule = cast(MFTModule, pl_module).datamodule
        answers: list[Answer] = outputs
        if self._writer is not None:
            chat_format, held = datamodule.chat_format, datamodule.questions.batch(batch)
            self._writer.add(
                batch,
                [
                    {
                        "answer": chat_format.decode(given.ids),
                        "finished": given.finished,
                        "exact": is_exact(chat_format, given, question.reference),
                    }
                    for question, given in zip(held, answers, strict=True)
                ],
            )
        if self._bar is not None:
            self._done += len(answers)
            self._bar.reach(self._done, len(answers))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()
        ranks.wait_for_all("answered")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
