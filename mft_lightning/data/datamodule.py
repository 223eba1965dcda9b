"""The LightningDataModule: task directories to planned batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from torch.utils.data import DataLoader

from mft_lightning.data.admission import RecordPolicy
from mft_lightning.data.batch_sizes import DEFAULT_PER_DEVICE, derive_batch_sizes
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.cores import available_cores
from mft_lightning.data.evaluated import EvaluatedData
from mft_lightning.data.held_out import Questions
from mft_lightning.data.loader import TrainLoader, TrainSteps
from mft_lightning.data.place import data_parallel_place
from mft_lightning.data.plan import Plan
from mft_lightning.data.sampling import parse_task_sampling
from mft_lightning.data.splits import find_shares
from mft_lightning.data.tasks import find_tasks, find_validation_tasks, parse_task_weights
from mft_lightning.data.token_cache import CacheSettings, default_cache_dir
from mft_lightning.data.token_table import RecordTable
from mft_lightning.data.tokenizer import add_role_tokens, load_tokenizer, vocabulary_digest
from mft_lightning.data.whole_steps import in_whole_steps
from mft_lightning.errors import UserError
from mft_lightning.shipped import expanded, shipped_example
from mft_lightning.words import check_words


class MFTDataModule(EvaluatedData):
    """Task directories of JSONL conversations, tokenised, masked, planned and batched.

    Args:
        data_paths: task directories, a list or the string "[a,b,c]"; the last part of a path is the task's name.
        tokenizer_path: directory or hub id of the tokenizer.
        valid_data_paths: a separate validation set, directories named as the tasks; instead of a validation share.
        data_split: percentages "train,valid,test" of each task, or a list of them, shuffled by the seed. Default
            "95,5,0"; beside valid_data_paths "100,0,0", and none of validation, like "95,0,5".
        tokenize_mode: "sft" learns from bot turns only, "pretrain" from every token.
        padding_mode: "pack" lays conversations end to end without padding, isolated from each other; "padding" gives
            each a row; "concat" (pretrain only) cuts each task's token stream into rows of seq_length.
        seq_length: most tokens of a conversation.
        on_overlong: what becomes of longer ones: "drop" (counted), "truncate" from the end, or "error".
        on_bad_record: "error" stops at the first bad line, "skip" leaves bad lines out and counts them.
        max_skipped_share: most of a task's records that may be bad before skipping becomes an error.
        total_train_batch_size: conversations of one optimizer step over all devices.
        per_device_train_batch_size: conversations of one micro-batch: at most when padded, on average when packed.
        gradient_accumulation_steps: micro-batches per device and optimizer step.
        per_device_valid_batch_size: conversations of a validation micro-batch. Default: as in training.
        total_train_batch_tokens: most tokens of one optimizer step over all devices, instead of conversations. A longer
            conversation stands alone.
        task_weights: loss weight of each task (case3 and case4), a mapping by name or a list; scaled to mean 1.
        task_sampling: "proportional": every conversation once an epoch. {temperature: T}: a task of n conversations is
            drawn in proportion to n^(1/T). Or a rate for each task, a mapping by name or a list.
        num_workers: loader processes of each device. Default: from the cores there are, at most 4.
        preprocessing_num_workers: processes that tokenise. Default: from the cores there are.
        cache_dir: where token ids are kept between runs. Default: mft_lightning/tokens in the user's cache.
        cache_by_contents: tell changed files by their bytes, which are all read then, not by size and time.
        eos_token: closes every answer. Default: the tokenizer's.
        pad_token: fills padded rows. Default: <|padding|> where the tokenizer has it, else its own, else eos.
        role_tokens: "text" leaves the role markers ordinary text; "added" makes each of them one token, for which
            embeddings grow if they must.
        normalize_punctuation: rewrite full-width punctuation in all contents to ASCII, as the original did.
        trust_remote_code: run code that comes with the tokenizer.
        max_evaluation_conversations: at most so many conversations of each task in an evaluation. Default: all.
        exclude_tasks: tasks that are left out of evaluations.
        devices: that share out a step, of all nodes; the command line takes it from trainer.devices, trainer.num_nodes
            and parallel.tensor_parallel_size.
        seed: of the split and the shuffles.
    """

    def __init__(
        self,
        *,
        data_paths: list[str] | str,
        tokenizer_path: str | Path,
        valid_data_paths: list[str] | str | None = None,
        data_split: str | list[float] | None = None,
        tokenize_mode: Literal["sft", "pretrain"] = "sft",
        padding_mode: Literal["pack", "padding", "concat"] = "pack",
        seq_length: int = 2048,
        on_overlong: Literal["drop", "truncate", "error"] = "drop",
        on_bad_record: Literal["error", "skip"] = "error",
        max_skipped_share: float = 0.05,
        total_train_batch_size: int | None = None,
        per_device_train_batch_size: int | None = None,
        gradient_accumulation_steps: int | None = None,
        per_device_valid_batch_size: int | None = None,
        total_train_batch_tokens: int | None = None,
        task_weights: dict[str, float] | list[float] | None = None,
        task_sampling: dict[str, float] | list[float] | str = "proportional",
        num_workers: int | None = None,
        preprocessing_num_workers: int | None = None,
        cache_dir: str | None = None,
        cache_by_contents: bool = False,
        eos_token: str | None = None,
        pad_token: str | None = None,
        role_tokens: Literal["text", "added"] = "text",
        normalize_punctuation: bool = False,
        trust_remote_code: bool = False,
        max_evaluation_conversations: int | None = None,
        exclude_tasks: list[str] | None = None,
        devices: int = 1,
        seed: int = 42,
    ) -> None:
        check_words("data", MFTDataModule.__init__, locals())
        if seq_length < 2:
            raise UserError(f"data.seq_length: {seq_length} leaves no token to predict. Give at least 2.")
        if per_device_valid_batch_size is not None and per_device_valid_batch_size < 1:
            raise UserError(f"data.per_device_valid_batch_size: {per_device_valid_batch_size} is less than 1.")
        if not 0 <= max_skipped_share <= 1:
            raise UserError(f"data.max_skipped_share: {max_skipped_share} is no share from 0 to 1.")
        if num_workers is not None and num_workers < 0:
            raise UserError(f"data.num_workers: {num_workers} is negative.")
        if preprocessing_num_workers is not None and preprocessing_num_workers < 1:
            raise UserError(f"data.preprocessing_num_workers: {preprocessing_num_workers} is less than 1.")
        if cache_dir == "":
            raise UserError("data.cache_dir: is empty. Give a directory, or leave it out for the user's cache.")
        if padding_mode == "concat" and tokenize_mode != "pretrain":
            raise UserError(
                "data.padding_mode: concat cuts a stream of tokens into rows, across conversations. It is for "
                "data.tokenize_mode: pretrain; use pack or padding."
            )
        if padding_mode == "concat" and seq_length < 3:
            raise UserError(f"data.seq_length: {seq_length} can leave a row of one token. Give at least 3 for concat.")
        if padding_mode == "concat" and on_overlong != "drop":
            raise UserError("data.on_overlong: with data.padding_mode: concat no record is too long. Leave it out.")
        tasks = find_tasks(data_paths)
        valid_tasks = find_validation_tasks(valid_data_paths, tasks)
        batch_sizes = derive_batch_sizes(
            total_train_batch_size,
            per_device_train_batch_size,
            gradient_accumulation_steps,
            devices=devices,
            tokens=total_train_batch_tokens,
        )
        tokenizer = load_tokenizer(
            shipped_example(tokenizer_path),
            eos_token=eos_token,
            pad_token=pad_token,
            trust_remote_code=trust_remote_code,
        )
        new_tokens = add_role_tokens(tokenizer) if role_tokens == "added" else []  # no model knows them yet
        super().__init__(
            tasks=tasks,
            valid_tasks=valid_tasks,
            shares=find_shares(data_split, separate=bool(valid_tasks)),
            policy=RecordPolicy(
                seq_length=seq_length,
                on_overlong=on_overlong,
                on_bad_record=on_bad_record,
                max_skipped_share=max_skipped_share,
                concat=padding_mode == "concat",
            ),
            tokenizer=tokenizer,
            chat_format=ChatFormat(tokenizer, tokenize_mode=tokenize_mode, normalize_punctuation=normalize_punctuation),
            cache=CacheSettings(
                directory=expanded(cache_dir).absolute() if cache_dir else default_cache_dir(),
                processes=preprocessing_num_workers or available_cores(),
                by_contents=cache_by_contents,
            ),
            packed=padding_mode == "pack",
            batch_size=per_device_valid_batch_size or batch_sizes.per_device or DEFAULT_PER_DEVICE,
            num_workers=num_workers,
            seed=seed,
        )
        if role_tokens == "text" and self.chat_format.role_ids is not None:
            raise UserError(
                f"data.role_tokens: the tokenizer in {tokenizer_path} has the role markers as tokens, and a model that "
                "was trained with it knows them so. Set data.role_tokens: added."
            )
        self.task_weights = parse_task_weights(task_weights, self.task_names)
        self.task_sampling = parse_task_sampling(task_sampling, self.task_names)
        self.batch_sizes, self.devices = batch_sizes, devices
        self.tokenizer_path = tokenizer_path
        self.role_tokens, self.new_tokens = role_tokens, new_tokens
        self.given_limits = (max_evaluation_conversations, exclude_tasks or [])
        self.limit_evaluations(*self.given_limits)

    @cached_property
    def plan(self) -> Plan:
        """The plan of the training split.

        Raises:
            UserError: a sampling rate at which an epoch sees nothing of a task.
        """
        table, sizes = self.table("train"), self.batch_sizes
        draws = self.task_sampling.draws(table.tasks, self.task_names, self.seed)
        if draws is not None and sizes.tokens is not None:
            draws = in_whole_steps(draws, table.lengths, sizes.tokens)
        return Plan(lengths=table.lengths, sizes=sizes, packed=self.packed, seed=self.seed, draws=draws)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the global batches and what is measured, by config key; a run goes on only with the same."""
        table = self.table("train")
        return {
            "data.data_paths (tasks)": self.task_names,
            "data.total_train_batch_size": self.batch_sizes.total,
            "data.total_train_batch_tokens": self.batch_sizes.tokens,
            "data.task_sampling": self.task_sampling.setting,
            "seed_everything": self.seed,
            "training conversations": len(table),
            "training tokens (digest)": table.digest,
            "validation tokens (digest)": self.table("valid").digest,
            "data.role_tokens": self.role_tokens,
            "tokenizer (digest)": vocabulary_digest(self.tokenizer),
        }

    def train_dataloader(self) -> TrainLoader:
        rank, world = data_parallel_place(self.trainer)
        steps = TrainSteps(
            self.table("train"), self.plan, tasks=len(self.tasks), pad_id=self.pad_id, rank=rank, world=world
        )
        return TrainLoader(steps, self._workers(), pinned=self._feeds_gpu())

    def ask(self, splits: Sequence[str], per_task: int | None, batch_size: int) -> Questions:
        """Lay out what ``predict_dataloader`` asks: at most ``per_task`` conversations of each task and split."""
        tables = {split: cast(RecordTable, self.table(split)) for split in splits}  # there are no others in sft mode
        parts = [(split, table, self.evaluated(split, per_task)) for split, table in tables.items()]
        self.questions = Questions(parts, len(self.tasks), self.chat_format.eos_token_id, batch_size)
        return self.questions

    def predict_dataloader(self) -> DataLoader[int]:
        """Numbers of this rank's batches of ``questions``."""
        return DataLoader(cast(Any, self.questions.share(*data_parallel_place(self.trainer))), batch_size=None)
