"""A run's keys to what decides the memory of its steps, for devices that need not be here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mft_lightning.data.batch_sizes import BatchSizes
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.errors import UserError
from mft_lightning.model.module import MFTModule
from mft_lightning.model.parallel import ParallelSettings
from mft_lightning.model.settings import LoraSettings, QLoraSettings
from mft_lightning.model.source import load_config
from mft_lightning.model.step_setup import Sharing, StepSetup, meta_network
from mft_lightning.model.supervised_loss import SupervisedLM
from mft_lightning.run_config import RunConfig
from mft_lightning.training.layout import Layout, data_parallel_size, find_layout
from mft_lightning.training.strategies import make_strategy

EXTRA: dict[str, dict[str, Any]] = {
    "devices": {"type": int | None, "default": None, "help": "Devices, which need not be here. Default: the run's."},
    "device": {"type": str | None, "default": None, "help": "cpu or cuda. Default: what the run would take here."},
    "device-memory": {"type": float | None, "default": None, "help": "GiB that each device has."},
    "length": {
        "type": int | None,
        "default": None,
        "help": "Tokens of a conversation, on average if packed. Default: data.seq_length, the most.",
    },
    "json": {"action": "store_true", "help": "One JSON object, in bytes, instead of tables."},
}


class PlannedRun(RunConfig):
    """The keys of a run, and of how much memory it needs.

    Args:
        argv: the command line after the command's name.
    """

    def __init__(self, argv: list[str]) -> None:
        super().__init__(argv, "estimate", EXTRA)

    device_keys = (*RunConfig.device_keys, "devices")

    @staticmethod
    def count_devices(
        accelerator: Any, devices: Any, num_nodes: int, tensor_parallel_size: int, planned: int | None = None
    ) -> int:
        """Of as many as are asked for, where they are not here; ``--devices`` stands for all of them."""
        if planned is not None:
            if planned < 1:
                raise UserError(f"--devices: {planned} is less than 1.")
            return data_parallel_size(Layout(planned, planned, 1), tensor_parallel_size)
        try:
            layout = find_layout(accelerator, devices, num_nodes)
        except UserError:
            layout = find_layout("cpu", devices, num_nodes)  # of which there are always enough
        return data_parallel_size(layout, tensor_parallel_size)

    def place(self, keys: dict[str, Any]) -> dict[str, Any]:
        """As they are, if a strategy can be made of them; nothing runs."""
        layout, precision = Layout(self.devices, self.devices, 1), str(keys["precision"])
        make_strategy(
            keys["strategy"],
            self.settings.parallel,
            layout=layout,
            precision=precision,
            undivided=self.model.undivided,
            command=(),
        )
        return keys

    @property
    def devices(self) -> int:
        """That share a step."""
        return self.datamodule.devices * self.settings.parallel.tensor_parallel_size

    @property
    def length(self) -> int:
        """Tokens that every conversation is taken to have."""
        most = self.datamodule.policy.seq_length
        length = most if self.config["length"] is None else self.config["length"]
        if not 2 <= length <= most:
            raise UserError(f"--length: {length} is no number from 2 to data.seq_length, {most}.")
        return length

    def step(self) -> StepSetup:
        """What decides the memory of a step.

        Raises:
            UserError: a number that is none, or a strategy or model of which the memory is not known.
        """
        module, keys = self.model, self.trainer_config
        setup = StepSetup(
            network=self.network(),
            precision=str(keys["precision"] or "32-true"),
            sharing=_sharing(keys["strategy"], self.devices, self.settings.parallel),
            devices=self.devices,
            parallel=self.settings.parallel,
            checkpoint_activations=module.checkpoint_activations,
            conversations=1,
            length=self.length,
            packed=self.datamodule.packed,
            micro_batches=1,
            device=_device(self.config["device"], keys["accelerator"]),
        )
        return batched(self.datamodule.batch_sizes, setup)

    @property
    def takes_adapters(self) -> bool:
        """Whether adapters can be trained: tokens that are new would need embeddings and a head that are not one."""
        source = self.model.source
        config = load_config(source.path, source.model_type, source.trust_remote_code)
        known = not self.datamodule.new_tokens and len(self.datamodule.tokenizer) <= config.vocab_size
        return known or not config.tie_word_embeddings

    def network(
        self, adapters: LoraSettings | None = None, quantization: QLoraSettings | None = None, **changed: Any
    ) -> SupervisedLM:
        """The run's network without weights, or one that differs from it.

        Args:
            adapters: in place of its own, or of none.
            quantization: of the base, where it has none.
            changed: fields of the run's ``ModelSource`` with other values.
        """
        return network_of(self.model, self.datamodule, adapters, quantization, **changed)


def network_of(
    module: MFTModule,
    datamodule: MFTDataModule,
    adapters: LoraSettings | None = None,
    quantization: QLoraSettings | None = None,
    **changed: Any,
) -> SupervisedLM:
    """The same, of a run's module and data module."""
    own = module.lora if module.peft_type is not None else None
    source = replace(module.source, **changed)
    tokens, multiple_of = len(datamodule.tokenizer), module.pad_vocab_to_multiple_of
    new = len(datamodule.new_tokens)
    return meta_network(source, adapters or own, quantization or module.quantization, tokens, multiple_of, new)


def batched(sizes: BatchSizes, setup: StepSetup) -> StepSetup:
    """A setup with the micro-batches that its groups get of a step, all of whose conversations are as long."""
    total = sizes.total if sizes.tokens is None else max(1, sizes.tokens // setup.length)
    assert total is not None
    micro_batches = sizes.micro_batches(total, setup.data_parallel_size)
    conversations = -(-total // (setup.data_parallel_size * micro_batches))  # as they are dealt
    return replace(setup, micro_batches=micro_batches, conversations=conversations)


def _sharing(strategy: Any, devices: int, settings: ParallelSettings) -> Sharing:
    if strategy == "auto":
        if settings.tensor_parallel_size > 1:
            return "fsdp"
        return "ddp" if devices > 1 else "one device"
    if strategy in ("ddp", "fsdp"):
        return strategy
    kind = type(strategy).__name__
    raise UserError(f"trainer.strategy: what {kind} needs is not known. Estimate with ddp or fsdp.")


def _device(asked: str | None, accelerator: Any) -> str:
    if asked not in (None, "cpu", "cuda"):
        raise UserError(f"--device: {asked} is none of cpu, cuda.")
    if asked is None:
        on_gpu = torch.cuda.is_available() if accelerator == "auto" else accelerator != "cpu"
        return "cuda" if on_gpu else "cpu"
    return asked
