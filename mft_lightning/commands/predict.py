"""``predict``: the conversations of a run's task directories, answered by a checkpoint and compared with the data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from mft_lightning import ranks
from mft_lightning.commands.answered import summary, summary_file, summary_table, write_answers
from mft_lightning.commands.asking import add_generation_options, generation_settings
from mft_lightning.commands.prepared import build_for, named_checkpoint
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.held_out import Questions
from mft_lightning.data.splits import SPLITS
from mft_lightning.data.tokenizer import vocabulary_digest
from mft_lightning.errors import UserError
from mft_lightning.paths import given_file
from mft_lightning.quiet import quieten
from mft_lightning.run_config import RunConfig
from mft_lightning.screen import labelled, say, shown
from mft_lightning.training.answer_parts import AnswerParts
from mft_lightning.training.checkpoint_dirs import CheckpointInfo, read_metadata
from mft_lightning.training.fsdp1 import FlatShardedStrategy
from mft_lightning.training.predicting import KeepAnswers
from mft_lightning.training.trainer import evaluation_trainer

OPTIONS: dict[str, dict[str, Any]] = {
    "split": {
        "type": str | None,
        "default": None,
        "help": f"{', '.join(SPLITS)} or all. Default: test where the run sets some aside for it, else valid.",
    },
    "limit": {"type": int | None, "default": None, "help": "At most so many conversations of each task and split."},
    "batch_size": {"type": int, "default": 8, "help": "Conversations that a device answers side by side."},
    "output": {
        "type": str | None,
        "default": None,
        "help": "The JSONL to write. Default: output_dir/predictions/<checkpoint>-<split>.jsonl.",
    },
    "overwrite": {
        "action": "store_true",
        "help": "Start anew; answers that are there stay until all new ones are.",
    },
}


class PredictConfig(RunConfig):
    """The keys of a run, and how to answer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        add_generation_options(parser)


def predict(argv: list[str]) -> None:
    """Ask ``--ckpt_path`` for the last answer of every conversation of a split, and write what it says."""
    quieten()
    config = PredictConfig(argv, "predict", extra=OPTIONS)
    with config.placing():
        _predict(config)


def _predict(config: PredictConfig) -> None:
    module, datamodule = config.model, config.datamodule
    _check(config)
    module.generation = generation_settings(config.config)
    module.check(datamodule, config.settings.parallel.tensor_parallel_size)
    checkpoint = named_checkpoint(config)
    assert checkpoint is not None
    with ranks.first_before_others("data"):
        datamodule.setup("predict")
    splits = _splits(config.config.split, datamodule)
    questions = datamodule.ask(splits, config.config.limit, config.config.batch_size)
    if not len(questions):
        raise UserError(f"--split {config.config.split}: holds no conversation with a whole answer to ask for.")
    output = _output(config, checkpoint, splits)
    checkpoint_io = build_for(config, checkpoint)
    parts = AnswerParts(output, _made_from(config, checkpoint, splits, questions))
    with parts.opened(overwrite=config.config.overwrite):
        questions.answered = set(parts.read())
        done = sum(len(questions.batches[number]) for number in questions.answered)
        said = f", {done:,} of them already" if done else ""
        say(f"answering {len(questions):,} conversations of {', '.join(splits)}{said}: {shown(checkpoint.path)}")
        if done < len(questions):
            keep = KeepAnswers(parts, bar=config.trainer_config.get("enable_progress_bar") is not False)
            keys, settings = config.trainer_config, config.settings
            trainer = evaluation_trainer(keys, settings, checkpoint_io, config.output_dir, [keep])
            try:
                trainer.predict(
                    module,
                    datamodule=datamodule,
                    return_predictions=False,
                    ckpt_path=checkpoint.path,
                    weights_only=True,
                )
            except (KeyboardInterrupt, SystemExit):  # the latter also of SIGTERM
                answered = sum(len(questions.batches[number]) for number in parts.read())
                say(f"answered {answered:,} of {len(questions):,}.{ranks.AFTERWARDS['predict']}")
                raise
        if ranks.is_first():
            _write(parts, config, checkpoint, splits)


def _check(config: PredictConfig) -> None:
    """Refuse options that cannot work, before anything is read."""
    options = config.config
    if options.ckpt_path is None:
        raise UserError(
            "--ckpt_path: is missing. Give last, best or a checkpoint directory; a model that this run has not trained "
            "is asked by generate --input."
        )
    if options.split not in (None, "all", *SPLITS):
        raise UserError(f"--split: {options.split!r} is none of {', '.join(SPLITS)}, all.")
    for key in ("limit", "batch_size"):
        if options[key] is not None and options[key] < 1:
            raise UserError(f"--{key}: {options[key]} is less than 1.")
    if config.datamodule.chat_format.pretrain:
        raise UserError("predict: data.tokenize_mode pretrain has no answers to ask for.")
    if isinstance(config.trainer_config["strategy"], FlatShardedStrategy):
        raise UserError("trainer.strategy: FSDPStrategy cannot answer prompts. Use fsdp or ddp.")


def _splits(asked: str | None, datamodule: MFTDataModule) -> list[str]:
    """The splits that are asked for; one that is named, or stands for none, must have something of every task."""
    if asked == "all":
        return list(SPLITS)
    split = asked or ("test" if len(datamodule.table("test")) else "valid")
    if split != "train":
        datamodule.check_evaluation(split)
    return [split]


def _output(config: PredictConfig, checkpoint: CheckpointInfo, splits: list[str]) -> Path:
    """Where the answers go."""
    given = config.config.output
    name = splits[0] if len(splits) == 1 else "all"
    output = config.output_dir / "predictions" / f"{checkpoint.path.name}-{name}.jsonl"
    if given is not None:
        output = given_file(given, "--output").absolute()
    given_file(output, "--output")
    given_file(summary_file(output), "--output")
    if output.suffix in (".gz", ".zst"):
        raise UserError(f"--output {given}: is written uncompressed. Name it .jsonl.")
    return output


def _made_from(
    config: PredictConfig, checkpoint: CheckpointInfo, splits: list[str], questions: Questions
) -> dict[str, Any]:
    """What decides the answers, so that none of others are taken for them."""
    files = read_metadata(checkpoint.path)["files"]
    weights = {name: about["sha256"] for name, about in files.items() if name.endswith(".safetensors")}
    digest = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:16]
    return {
        "--ckpt_path (digest of its weights)": digest,
        **config.model.description,
        "tasks": config.datamodule.task_names,
        "--split": splits,
        "--limit": config.config.limit,
        "--batch_size": config.config.batch_size,
        "conversations (digest)": questions.digest,
        "tokenizer (digest)": vocabulary_digest(config.datamodule.tokenizer),
        "trainer.precision": str(config.config.trainer.precision),
        **{f"--{name}": value for name, value in asdict(config.model.generation).items()},
    }


def _write(parts: AnswerParts, config: PredictConfig, checkpoint: CheckpointInfo, splits: list[str]) -> None:
    """The answers and what they come to, and no parts any more."""
    datamodule, output = config.datamodule, parts.output
    said = {"checkpoint": str(checkpoint.path), "splits": splits, "settings": asdict(config.model.generation)}
    batches = parts.read()
    found = summary(datamodule.questions, batches, datamodule.task_names)
    beside = write_answers(output, datamodule, batches, {**said, **found})
    parts.remove()
    say("", summary_table(found), "", *labelled([("answers", shown(output)), ("summary", shown(beside))]))
