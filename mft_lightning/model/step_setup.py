"""What decides how much memory an optimizer step needs: a network without weights, and what a device does with it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mft_lightning.errors import UserError
from mft_lightning.model.lora import add_lora, modules_to_save
from mft_lightning.model.parallel import ParallelSettings, transformer_layers
from mft_lightning.model.quantized import quantize
from mft_lightning.model.settings import LoraSettings, QLoraSettings
from mft_lightning.model.source import ModelSource, load_config, model_options
from mft_lightning.model.supervised_loss import SupervisedLM
from mft_lightning.model.tensor_parallel import narrow_head, narrow_layer
from mft_lightning.model.weights import sketch
from mft_lightning.model.whole_modules import find_room

Sharing = Literal["one device", "ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class StepSetup:
    """What decides how much memory a step needs.

    Attributes:
        network: whole, on the meta device, of :func:`meta_network`.
        precision: ``trainer.precision``.
        sharing: how the devices share the work.
        devices: that do.
        parallel: options of ``fsdp``.
        checkpoint_activations: whether the backward pass computes activations again.
        conversations: of a micro-batch.
        length: tokens of each; all but the first are taken to be supervised.
        packed: whether they stand in one row.
        micro_batches: of each group's share of a step.
        device: "cpu" or "cuda".
    """

    network: SupervisedLM
    precision: str
    sharing: Sharing
    devices: int
    parallel: ParallelSettings
    checkpoint_activations: bool
    conversations: int
    length: int
    packed: bool
    micro_batches: int
    device: str

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.conversations * self.length

    @property
    def data_parallel_size(self) -> int:
        """Groups of devices that share out the data; a group is one device, or those that share each layer."""
        return self.devices // self.parallel.tensor_parallel_size

    def group_member(self) -> SupervisedLM:
        """The network with what one device of a group has of it, before it is sharded over the groups."""
        if (size := self.parallel.tensor_parallel_size) == 1:
            return self.network
        network = copy.deepcopy(self.network)
        for layer in transformer_layers(network):
            narrow_layer(layer, network.causal_lm.config.model_type, size)
        narrow_head(network.causal_lm, size)
        return network


def meta_network(
    source: ModelSource,
    adapters: LoraSettings | None,
    quantization: QLoraSettings | None,
    tokens: int,
    multiple_of: int | None,
    new_tokens: int = 0,
) -> SupervisedLM:
    """A run's network without its weights.

    Args:
        source: the base model, of which the configuration alone is read.
        adapters: their settings; None trains all weights.
        quantization: of the base below them; None leaves it as it is.
        tokens: of the tokenizer, for which embeddings grow.
        multiple_of: of rows that they grow to.
        new_tokens: tokens that the base has never seen.

    Raises:
        UserError: no configuration, or what its model or its adapters need is not known.
    """
    config = load_config(source.path, source.model_type, source.trust_remote_code)
    if config.model_type != "gpt_neox":
        raise UserError(f"model.model_type: what a {config.model_type} needs is not known; only a gpt_neox's is.")
    model = sketch(config, source.dtype, **model_options(source, config))
    room = find_room(model, tokens, multiple_of, adapters)
    if room is not None:
        model.resize_token_embeddings(*room, mean_resizing=False)
    if quantization is not None:
        quantize(model, quantization, () if adapters is None else modules_to_save(adapters))
    if adapters is None:
        return SupervisedLM(model)
    adapted: Any = add_lora(model, adapters, base_path=source.path, new_tokens=new_tokens, grown=room is not None)
    network = SupervisedLM(adapted)
    if adapted.peft_config["default"].use_dora:
        raise UserError("model.lora.use_dora: what it needs is not known. Leave it out for the least that it can be.")
    if len({_trained(layer) for layer in transformer_layers(network)}) > 1:
        raise UserError("model.lora.rank_pattern: what layers of different ranks need is not known. Leave it out.")
    return network


def _trained(layer: nn.Module) -> tuple[int, ...]:
    """Elements of each tensor of a layer that trains."""
    return tuple(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
