"""The model of a run: base weights or a random draw, full or LoRA. The one place where these differ."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mft_lightning import ranks
from mft_lightning.errors import UserError
from mft_lightning.model.adapters import COPY, has_adapters
from mft_lightning.model.base import base_state
from mft_lightning.model.export import load_state
from mft_lightning.model.lora import add_lora, modules_to_save
from mft_lightning.model.lora_start import LoraStart
from mft_lightning.model.objective import Objective
from mft_lightning.model.probe import check_assumptions
from mft_lightning.model.quantized import materialise_quantized, quantize, whole_numel
from mft_lightning.model.settings import LoraSettings, QLoraSettings
from mft_lightning.model.source import ModelSource, build_causal_lm, sketch_causal_lm
from mft_lightning.model.supervised_loss import SupervisedLM
from mft_lightning.model.weights import (
    DrawnWeights,
    GrownWeights,
    StoredWeights,
    Weights,
    grow_embeddings,
    materialise,
    sketch,
    without_layers,
)
from mft_lightning.model.whole_modules import count_rows, find_room
from mft_lightning.shipped import expanded

FEW_TOKENS = 64  # of a small model that is tried out


@dataclass(frozen=True)
class Built:
    """A network, and where its values come from if it is still a sketch on the meta device.

    Args:
        network: with its adapters, if it has any.
        weights: what a sketch's base is to have; None where the base is complete.
        start: what adapters that have no values yet are to have; None where all weights train.
        base_rows: of the embeddings of a stored base, where they had to grow; None where they are as it has them.
        unquantized: what the base was before it was quantised; None where it was not.
    """

    network: SupervisedLM
    weights: Weights | None
    start: LoraStart | None
    base_rows: int | None = None
    unquantized: Weights | None = None

    @property
    def base(self) -> Mapping[str, Tensor]:
        """The weights of the frozen base that adapters name, before any quantisation; none where all weights train.

        Asked before :meth:`complete`, after which adapters may hold a part of them, and layers less of each
        (``frozen.py``).
        """
        if not has_adapters(self.network.model):
            return {}
        weights = self.weights if self.unquantized is None else self.unquantized
        if weights is None:
            return base_state(self.network.model, self.base_rows)
        if self.base_rows is not None and isinstance(weights, GrownWeights):
            return weights.weights
        return weights

    def complete(self, part: nn.Module | None = None) -> None:
        """Give a part of the network, or all that is left of it, its values; nothing where it has them."""
        if self.weights is not None:
            materialise(self.network.causal_lm, self.weights, within=part)
        if self.start is not None:
            self.start.fill(self.network.causal_lm, within=part)


def make_network(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapters: LoraSettings | None,
    quantization: QLoraSettings | None,
    objective: Objective,
    random_base: str,
    checkpoint_activations: bool,
    pad_vocab_to_multiple_of: int | None,
    packed: bool,
    new_tokens: int = 0,
    sketched: bool = False,
) -> Built:
    """The network of a run, from its base to its adapters, tried out on what training takes for granted.

    Args:
        source: the base model.
        tokenizer: that the embeddings must have room for.
        adapters: their settings; None trains all weights.
        quantization: of the base below them; None leaves it as it is.
        objective: what is minimised of a token.
        random_base: the directory that adapters name as their base where the base is a random draw.
        checkpoint_activations: whether the backward pass computes activations again.
        pad_vocab_to_multiple_of: of rows that embeddings grow to, where they must.
        packed: whether rows will be packed.
        new_tokens: tokens that the base has never seen.
        sketched: leave it on the meta device; a small model of its kind is tried out.

    Raises:
        UserError: a model that cannot be loaded, or that does not do what training takes for granted.
    """
    frozen, weights = adapters is not None, None
    if sketched or quantization is not None:
        model, weights = sketch_causal_lm(source)
        # Of a frozen base the digest reads everything; and what the first rank finds whole the others read.
        if isinstance(weights, StoredWeights) and not frozen and ranks.is_first():
            weights.check()
        rows, room = count_rows(model), find_room(model, len(tokenizer), pad_vocab_to_multiple_of, adapters)
        if room is not None:
            weights = GrownWeights(weights, *room, source.seed)
            model.resize_token_embeddings(*room, mean_resizing=False)
        small = _small(model)
        check_assumptions(SupervisedLM(small, objective), packed=packed)
        nn.Module.to(small, "meta")  # or its memory stays until cycles are looked for
        if quantization is not None:
            quantize(model, quantization, () if adapters is None else modules_to_save(adapters))
    else:
        model = build_causal_lm(source)
        rows, room = count_rows(model), find_room(model, len(tokenizer), pad_vocab_to_multiple_of, adapters)
        if room is not None:
            grow_embeddings(model, *room, source.seed)
        check_assumptions(SupervisedLM(model, objective), packed=packed)
    name_special_tokens(model, tokenizer)
    keep_logits = not checkpoint_activations  # who saves memory saves that as well
    grown, base_path = room is not None, saved_path(random_base if source.init == "random" else source.path)
    adapted = None
    if adapters is not None:
        adapted = add_lora(model, adapters, base_path=base_path, new_tokens=new_tokens, grown=grown)
    if checkpoint_activations:  # after peft, which would let the embeddings' output need a gradient for good
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # that is for reentrant ones; layers below all adapters need no backward
    if adapters is None or adapted is None:
        return Built(SupervisedLM(model, objective, keep_logits=keep_logits), weights, None)
    start = LoraStart(adapters.init, source.seed)
    if adapters.start_from is not None:
        stored = _stored(adapted, adapters.start_from)
        start.copies = {name: value for name, value in stored.items() if COPY in name}
        start.stored = {name: value for name, value in stored.items() if COPY not in name}
    network = SupervisedLM(adapted, objective, keep_logits=keep_logits)
    base_rows = rows if grown and source.init == "pretrained" else None  # a random base is written as it grew
    if sketched:
        return Built(network, weights, start, base_rows)
    if weights is not None:
        materialise_quantized(model, weights)
    if not start.changes_base:
        start.fill(model)
    return Built(network, None, start, base_rows, unquantized=weights)


def _stored(model: nn.Module, start_from: str) -> dict[str, Tensor]:
    """The values of another adapter of the same shape, by the model's names."""
    try:
        state = load_state(model, expanded(start_from))
    except UserError as error:
        raise UserError(f"model.lora.start_from: {error}") from error
    for name, value in state.items():
        if not all(bool(end.isfinite()) for end in value.aminmax()):
            raise UserError(f"model.lora.start_from: {start_from}: {name} is not finite; the weights are damaged.")
    return state


def _small(model: PreTrainedModel) -> PreTrainedModel:
    """A random model of the same kind, with one layer and few tokens."""
    config = without_layers(model.config, 1)
    config.get_text_config().vocab_size, config.pad_token_id = FEW_TOKENS, None
    small = sketch(config, torch.float32)
    materialise(small, DrawnWeights(deepcopy(small), torch.float32, 0))
    return small


def name_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer's eos and pad tokens into the generation config."""
    generation = model.generation_config
    assert generation is not None
    generation.eos_token_id = tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id


def saved_path(path: str) -> str:
    """A path as a saved adapter should name it: absolute where it is a directory, a hub id as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Trainable and total parameters, of 4 bits too."""
    sizes = [(whole_numel(parameter), parameter.requires_grad) for parameter in module.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
