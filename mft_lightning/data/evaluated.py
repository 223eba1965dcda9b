"""Conversations of tasks, tokenised and laid out in splits, and those of them that evaluations look at."""

from __future__ import annotations

import lightning as L
import numpy as np
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from mft_lightning.data.admission import RecordPolicy, TaskReport
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.collate import MicroBatch
from mft_lightning.data.cores import available_cores
from mft_lightning.data.corpus import Corpus, load_corpus
from mft_lightning.data.loader import EvaluationSteps
from mft_lightning.data.place import data_parallel_place
from mft_lightning.data.plan import deal_evaluation, limit_per_task
from mft_lightning.data.splits import SPLITS, nothing_to_evaluate
from mft_lightning.data.task_files import check_files
from mft_lightning.data.tasks import Task
from mft_lightning.data.token_cache import CacheSettings, TokenCache
from mft_lightning.data.token_table import TokenTable
from mft_lightning.data.workers import loader_options
from mft_lightning.errors import UserError, nearest


class EvaluatedData(L.LightningDataModule):
    """The conversations there are, without a plan to train on them.

    Args:
        tasks: directories of records.
        valid_tasks: directories of validation records, where there are such, of tasks of the same names.
        shares: of each task's records in the splits.
        policy: which records are admitted.
        tokenizer: that a model reads with.
        chat_format: how it writes conversations.
        cache: where their tokens are kept.
        packed: whether a micro-batch's conversations stand in one row.
        batch_size: conversations of an evaluation's micro-batch.
        num_workers: loader processes of each device. None: from the cores there are, at most 4.
        seed: of the split and of what is chosen.
    """

    def __init__(
        self,
        *,
        tasks: list[Task],
        valid_tasks: list[Task],
        shares: tuple[float, float, float],
        policy: RecordPolicy,
        tokenizer: PreTrainedTokenizerBase,
        chat_format: ChatFormat,
        cache: CacheSettings,
        packed: bool,
        batch_size: int,
        num_workers: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.tasks, self.valid_tasks, self.shares = tasks, valid_tasks, shares
        self.policy, self.seed = policy, seed
        self.tokenizer, self.chat_format = tokenizer, chat_format
        self.cache_settings = cache
        self.packed, self.valid_batch_size, self.num_workers = packed, batch_size, num_workers
        self.corpora: list[Corpus] = []
        self.tables: dict[str, TokenTable] | None = None
        self.limit_evaluations(None, [])

    def limit_evaluations(self, per_task: int | None, exclude_tasks: list[str]) -> None:
        """Evaluate at most so many conversations of each task, and none of some.

        Raises:
            UserError: a task that is not there, or no task left.
        """
        self.max_evaluation_conversations = per_task
        self.exclude_tasks = exclude_tasks
        if unknown := [name for name in self.exclude_tasks if name not in self.task_names]:
            raise UserError(
                f"evaluation.exclude_tasks: {unknown} is none of the tasks {', '.join(self.task_names)}."
                + nearest(unknown[0], self.task_names)
            )
        if set(self.exclude_tasks) == set(self.task_names):
            raise UserError("evaluation.exclude_tasks: leaves no task to evaluate. Set evaluation.strategy: none.")

    @property
    def task_names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @property
    def pad_id(self) -> int:
        assert self.tokenizer.pad_token_id is not None  # load_tokenizer sees to it
        return self.tokenizer.pad_token_id

    @property
    def reports(self) -> list[TaskReport]:
        """Counts of each task's directory."""
        return self.corpora[0].reports

    @property
    def valid_reports(self) -> list[TaskReport]:
        """Counts of each task's validation directory, where there are such."""
        return self.corpora[1].reports if self.valid_tasks else []

    @property
    def notes(self) -> list[str]:
        """What a user should know of settings that work."""
        if self.num_workers is None or self.num_workers <= (cores := available_cores()):
            return []
        return [
            f"note: data.num_workers: {self.num_workers} processes load batches, more than the {cores} core(s) there "
            "are. Leave it out for as many as suit them."
        ]

    def load(self, *, stop: bool = True) -> list[Corpus]:
        """The records of the task directories and, where there are such, those of the validation directories, once.

        Args:
            stop: whether tokenising ends at the first record that is an error; else it is told by ``setup`` only.

        Raises:
            UserError: what cannot be read, and the first refused record, if it stops there.
        """
        if not self.corpora:
            check_files([*self.tasks, *self.valid_tasks])
            cache = TokenCache(self.cache_settings, self.chat_format)
            for tasks, shares in ((self.tasks, self.shares), (self.valid_tasks, (0.0, 1.0, 0.0))):
                numbers = [self.task_names.index(task.name) for task in tasks]
                if tasks:
                    self.corpora.append(load_corpus(tasks, numbers, shares, cache, self.policy, self.seed, stop=stop))
        return self.corpora

    def setup(self, stage: str | None = None) -> None:
        """Tokenise what the cache does not hold, and lay out the splits, once.

        Raises:
            UserError: a bad record, or no conversation left to train on.
        """
        if self.tables is not None:
            return
        for corpus in self.load():
            corpus.refuse()
        tables = {split: self.corpora[0].table(split) for split in SPLITS}
        if self.valid_tasks:
            tables["valid"] = self.corpora[1].table("valid")
        present = np.bincount(tables["train"].tasks, minlength=len(self.tasks))
        if missing := [name for name, count in zip(self.task_names, present, strict=True) if count == 0]:
            reasons = {report.task: dict(report.dropped) for report in self.reports if report.task in missing}
            raise UserError(
                f"data.data_paths: no training conversation is left of {', '.join(missing)}; left out: {reasons}."
            )
        self.tables = tables

    def table(self, split: str) -> TokenTable:
        """The conversations of ``train``, ``valid`` or ``test``."""
        self.setup()
        assert self.tables is not None
        return self.tables[split]

    def check_evaluation(self, split: str, *, in_training: bool = False) -> None:
        """Raise where a task that is not excluded has nothing to evaluate on.

        Raises:
            UserError: naming the tasks and the ways on.
        """
        counts = np.bincount(self.table(split).tasks, minlength=len(self.tasks))
        wanted = {name: n for name, n in zip(self.task_names, counts, strict=True) if name not in self.exclude_tasks}
        missing = [name for name, count in wanted.items() if count == 0]
        if missing:
            raise nothing_to_evaluate(
                split,
                missing,
                self.shares,
                separate=bool(self.valid_tasks),
                others=len(missing) < len(wanted),
                in_training=in_training,
            )

    def val_dataloader(self) -> DataLoader[MicroBatch]:
        return self._evaluation_loader("valid")

    def test_dataloader(self) -> DataLoader[MicroBatch]:
        return self._evaluation_loader("test")

    def evaluated(self, split: str, per_task: int | None = None) -> np.ndarray:
        """Indices into ``table(split)`` of what an evaluation looks at, or at most ``per_task`` of each task of it."""
        tasks = self.table(split).tasks
        kept = limit_per_task(tasks, self.max_evaluation_conversations, self.seed)
        kept = kept[~np.isin(tasks[kept], [self.task_names.index(name) for name in self.exclude_tasks])]
        return kept[limit_per_task(tasks[kept], per_task, self.seed)]

    def evaluation_steps(self, split: str, chosen: np.ndarray) -> EvaluationSteps:
        """This rank's micro-batches of conversations of ``table(split)``; every rank has as many."""
        rank, world = data_parallel_place(self.trainer)
        table = self.table(split)
        dealt = [chosen[part] for part in deal_evaluation(table.lengths[chosen], self.valid_batch_size, rank, world)]
        return EvaluationSteps(table, dealt, packed=self.packed, pad_id=self.pad_id)

    def _evaluation_loader(self, split: str) -> DataLoader[MicroBatch]:
        steps = self.evaluation_steps(split, self.evaluated(split))
        return DataLoader(steps, batch_size=None, **loader_options(self._workers(), pinned=self._feeds_gpu()))

    def _workers(self) -> int:
        """Loader processes of this rank, which leave each rank of this machine a core of its own."""
        if self.num_workers is not None:
            return self.num_workers
        ranks = self.trainer.num_devices if self.trainer else 1
        return max(0, min(4, available_cores() // (2 * ranks) - 1))

    def _feeds_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
