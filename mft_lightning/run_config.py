"""The keys of a run: one parser for every command that takes a run's YAML, and the objects it describes."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DeepSpeedStrategy

from mft_lightning.aside import written_aside
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.errors import UserError, nearest
from mft_lightning.key_errors import instantiate
from mft_lightning.model.module import MFTModule
from mft_lightning.model.parallel import ParallelSettings
from mft_lightning.paths import given_path, nearest_beside
from mft_lightning.run_parser import DRY_RUN, RunParser, without_idle
from mft_lightning.shipped import CONFIGS, ROOT, expanded, shipped_config, shipped_example
from mft_lightning.training.callbacks import EarlyStoppingSettings
from mft_lightning.training.checkpoint import CheckpointSettings
from mft_lightning.training.evaluation import EvaluationSettings
from mft_lightning.training.layout import data_parallel_size, find_layout
from mft_lightning.training.strategies import ShardedStrategy
from mft_lightning.training.trainer import (
    RunSettings,
    check_pages,
    check_trainer_keys,
    placed,
    product_dtype,
    weights_dtype,
)
from mft_lightning.variables import MODE, escaped
from mft_lightning.yaml_text import as_yaml

GROUPS = {
    "evaluation": EvaluationSettings,
    "checkpoint": CheckpointSettings,
    "early_stopping": EarlyStoppingSettings,
    "parallel": ParallelSettings,
}
TRAINER_DEFAULTS = {"log_every_n_steps": 10, "enable_model_summary": False, "gradient_clip_val": 1.0}


class RunConfig(LightningCLI):
    """Parses a run's keys and makes its data module, its module and its settings; the Trainer is the command's.

    Args:
        argv: the command line after the command's name.
        extra: further arguments of the command, by name, as ``add_argument`` takes them.
    """

    datamodule: MFTDataModule
    model: MFTModule
    parser: RunParser
    # what count_devices takes
    device_keys: tuple[str, ...] = (
        "trainer.accelerator",
        "trainer.devices",
        "trainer.num_nodes",
        "parallel.tensor_parallel_size",
    )

    def __init__(self, argv: list[str], prog: str, extra: dict[str, dict[str, Any]] | None = None) -> None:
        self.extra = extra or {}
        self.command = [prog, *argv]
        super().__init__(
            MFTModule,
            MFTDataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=42,
            parser_kwargs={"exit_on_error": False, "parser_mode": MODE, "prog": f"python -m mft_lightning {prog}"},
            parser_class=RunParser,
            args=argv,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--output_dir",
            type=str | None,
            default=None,
            help="everything a run writes. Default: checkpoints/<config>, or <one>+<other> of several.",
        )
        parser.add_argument(
            "--tensorboard_dir", type=str | None, default=None, help="TensorBoard's files. Default: output_dir/runs."
        )
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="last, best, or a checkpoint directory.")
        for name, options in self.extra.items():
            parser.add_argument(f"--{name}", **options)
        for group, settings in GROUPS.items():
            parser.add_class_arguments(settings, group)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_seed)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_seed)
        parser.link_arguments("trainer.precision", "model.dtype", compute_fn=weights_dtype)
        parser.link_arguments("trainer.precision", "model.product_dtype", compute_fn=product_dtype)
        parser.link_arguments(
            ("model.tokenizer_path", "model.pretrained_model_path"),
            "data.tokenizer_path",
            compute_fn=lambda tokenizer, model: tokenizer or model,
        )
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")
        parser.link_arguments("evaluation.max_conversations_per_task", "data.max_evaluation_conversations")
        parser.link_arguments("evaluation.exclude_tasks", "data.exclude_tasks")
        parser.link_arguments(
            self.device_keys,
            "data.devices",
            compute_fn=self.count_devices,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = self.parser.keys(_with_shipped_configs(args))

    def placing(self) -> AbstractContextManager[None]:
        """Errors about keys are told with where these stand and are documented."""
        return self.parser.placing(self.command[1:])

    def before_instantiate_classes(self) -> None:
        with self.placing():
            check_trainer_keys(self.trainer_keys(self.config))

    def instantiate_classes(self) -> None:
        with self.placing():
            self._instantiate()

    def _instantiate(self) -> None:
        self.config_init = instantiate(self.parser, self.config)
        self.datamodule, self.model = self.config_init["data"], self.config_init["model"]
        self.settings = RunSettings(**{group: self.config_init[group] for group in GROUPS}, command=self.command)
        self.trainer_config = self.place(self.trainer_keys(self.config_init))

    @staticmethod
    def count_devices(accelerator: Any, devices: Any, num_nodes: int, tensor_parallel_size: int) -> int:
        """How many devices share a step, by ``trainer.accelerator``, ``devices`` and ``num_nodes``."""
        return data_parallel_size(find_layout(accelerator, devices, num_nodes), tensor_parallel_size)

    def place(self, keys: dict[str, Any]) -> dict[str, Any]:
        """The Trainer keys with the devices and the strategy of this run in place of what was asked for."""
        if self.model.optim.kind == "paged_adamw":
            check_pages(keys["accelerator"])
        keys = placed(keys, self.settings, undivided=self.model.undivided)
        if self.model.optim.is_own and isinstance(keys["strategy"], DeepSpeedStrategy):
            raise UserError(
                "model.optimizer: a class of your own does not run under DeepSpeedStrategy. Use ddp or fsdp."
            )
        return keys

    @staticmethod
    def trainer_keys(config: Any) -> dict[str, Any]:
        return dict(config["trainer"])

    @property
    def seed(self) -> int:
        return self.config.seed_everything

    @property
    def ckpt_path(self) -> str | None:
        return self.config.ckpt_path

    @property
    def dry_run(self) -> bool:
        return self.config.get(DRY_RUN, False)

    @property
    def sharded(self) -> bool:
        """Whether the strategy completes and shards a sketch of the network."""
        return isinstance(self.trainer_config["strategy"], ShardedStrategy)

    @property
    def output_dir(self) -> Path:
        if self.config.output_dir == "":
            raise UserError("output_dir: is empty. Give a directory.")
        if self.config.output_dir is not None:
            return given_path(self.config.output_dir, "output_dir:").absolute()
        given = [Path(str(config)) for config in self.config.get("config") or []]
        stems = [path.stem for path in given if path.is_file()]  # not a shell's <(...)
        return (Path("checkpoints") / ("+".join(dict.fromkeys(stems)) or "run")).absolute()

    @property
    def tensorboard_dir(self) -> Path:
        given = self.config.tensorboard_dir
        return given_path(given, "tensorboard_dir:").absolute() if given else self.output_dir / "runs"

    @property
    def keys(self) -> dict[str, Any]:
        """All keys of the run, nested, as ``--config`` takes them again from wherever: paths here are spelt out."""
        config = self.config.clone()
        config.output_dir, config.ckpt_path, config.checkpoint.allow_changes = str(self.output_dir), None, False
        keys = json.loads(self.parser.dump(config, format="json", skip_unset=False, skip_link_targets=True))
        keys["data"]["data_paths"] = [str(task.directory.absolute()) for task in self.datamodule.tasks]
        if self.datamodule.valid_tasks:
            keys["data"]["valid_data_paths"] = [str(task.directory.absolute()) for task in self.datamodule.valid_tasks]
        for group, name in (
            (keys["model"], "pretrained_model_path"),
            (keys["model"], "tokenizer_path"),
            (keys["model"]["lora"], "start_from"),
            (keys["data"], "cache_dir"),
            (keys, "tensorboard_dir"),
        ):
            group[name] = _spelt_out(group[name])
        return without_idle(keys)

    def save(self, file: Path) -> None:
        """Write the keys of the run as YAML."""
        with written_aside(file) as aside:
            aside.write_text(as_yaml(escaped(self.keys)), encoding="utf-8")


def _spelt_out(path: str | None) -> str | None:
    """A path that is here from the root on; a hub id, or what is not here, as it is."""
    here = expanded(shipped_example(path)) if path else None
    return str(here.absolute()) if here is not None and here.exists() else path


def _seed(value: bool | int) -> int:
    if isinstance(value, bool) or not 0 <= value < 2**32:
        raise UserError(f"seed_everything: {value} is no number from 0 to 2^32 - 1; a run is made again from it.")
    return value


def _with_shipped_configs(argv: list[str]) -> list[str]:
    found = []
    follows = False
    for word in argv:
        option, given, value = word.partition("=")
        if follows:
            word = _found_config(word)
        elif option in ("--config", "-c") and given:
            word = f"{option}={_found_config(value)}"
        follows = word in ("--config", "-c")
        found.append(word)
    return found


def _found_config(name: str) -> str:
    """A config here or, by its bare name, a shipped one.

    Raises:
        UserError: nothing, or neither has it.
    """
    if not name:
        raise UserError("--config: is empty. Give a YAML file, or leave it out.")
    found = shipped_config(name)
    path = expanded(found)
    if path.name == found and not path.exists():
        shipped = sorted(file.name for file in (ROOT / CONFIGS).glob("*.yaml"))
        raise UserError(
            f"--config {name}: there is no such file here, nor among the shipped ones: {', '.join(shipped)}."
            + nearest(path.with_suffix(".yaml").name, shipped, 0.8)
        )
    if not path.exists():
        raise UserError(f"--config {name}: there is no such file.{nearest_beside(path)}")
    return str(path)
