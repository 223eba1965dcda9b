"""What is measured and answered by a network: validation, test and prediction of the LightningModule."""

from __future__ import annotations

from typing import cast

import lightning as L

from mft_lightning.data.collate import MicroBatch
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.model.generation import Answer, GenerationSettings, answer_on_ranks
from mft_lightning.model.metrics import TaskSums, tell_callbacks
from mft_lightning.model.parallel import data_parallel_group
from mft_lightning.model.supervised_loss import SupervisedLM


class EvaluatedModule(L.LightningModule):
    """A network without its training.

    Attributes:
        network: once it is made.
        generation: how ``predict`` finds answers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network: SupervisedLM | None = None
        self.generation = GenerationSettings()

    def measure(self, tasks: list[str]) -> None:
        """Sum up each of these tasks' losses in validations and tests."""
        self.sums = {split: TaskSums(tasks) for split in ("val", "test")}

    @property
    def datamodule(self) -> MFTDataModule:
        return cast(MFTDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]  # Lightning sets it untyped

    @property
    def _network(self) -> SupervisedLM:
        assert self.network is not None
        return self.network

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        self._add("val", batch)

    def test_step(self, batch: MicroBatch, batch_idx: int) -> None:
        self._add("test", batch)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _add(self, prefix: str, micro: MicroBatch) -> None:
        output = self._network(micro)
        self.sums[prefix].to(self.device).update(micro.tasks, output.nll, micro.n_supervised, output.correct)

    def _report(self, prefix: str) -> None:
        sums = self.sums[prefix].to(self.device)  # where ranks meet, even if this one had nothing to add
        sums.process_group = data_parallel_group(self.trainer)
        values = {f"{prefix}/{name}": value for name, value in sums.compute().items()}
        sums.reset()
        tell_callbacks(self.trainer, values)
        for logger in self.trainer.loggers:  # by hand, to give the step that the axis is defined by
            logger.log_metrics({name: float(value) for name, value in values.items()}, step=self.trainer.global_step)

    def predict_step(self, batch: int, batch_idx: int) -> list[Answer]:
        """Answers to a batch of ``datamodule.questions``, by its number."""
        prompts = [held.prompt for held in self.datamodule.questions.batch(batch)]
        return answer_on_ranks(self._network, self.datamodule.tokenizer, prompts, self.generation)
