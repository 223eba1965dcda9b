"""The model of a run: base weights or a random draw, full or LoRA. The one place where these differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mft_lightning import ranks
from mft_lightning.data.tokenizer import contradictory
from mft_lightning.errors import UserError, first_line
from mft_lightning.model.adapters import COPY, has_adapters
from mft_lightning.model.attention import SDPA_BY_CONVERSATION, SLICED_MODEL_TYPES
from mft_lightning.model.base import base_state
from mft_lightning.model.export import load_state
from mft_lightning.model.generation_file import saved_generation_config
from mft_lightning.model.lora import add_lora, modules_to_save
from mft_lightning.model.lora_start import LoraStart
from mft_lightning.model.objective import Objective
from mft_lightning.model.probe import check_assumptions
from mft_lightning.model.quantized import materialise_quantized, quantize, whole_numel
from mft_lightning.model.settings import LoraSettings, QLoraSettings
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
Attention = Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]


@dataclass(kw_only=True)
class ModelSource:
    """Where the base model comes from and how it is held."""

    path: str
    init: Literal["pretrained", "random"]
    model_type: str
    dtype: torch.dtype
    attn_implementation: Attention
    trust_remote_code: bool
    seed: int


def load_config(path: str, model_type: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of the causal LM in ``path``, a directory or hub id.

    Raises:
        UserError: nothing there, another model type, or no causal LM.
    """
    key = "model.pretrained_model_path"
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except StrictDataclassError as error:
        raise contradictory(path, error) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: no model configuration in {path!r} ({first_line(error)}). Give a model directory or hub id."
        ) from error
    known = config.model_type if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else None
    architectures = config.architectures or []
    heads = [name for name in architectures if "For" in name and "ForCausalLM" not in name]
    if known is None or heads:
        what = heads[0] if heads else config.model_type
        raise UserError(f"{key}: {path} holds a {what}, which is no causal language model.")
    if known != model_type:
        raise UserError(f"{key}: {path} holds a {known} model. Set model.model_type: {known} if that is meant.")
    return config


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

        Asked before :meth:`complete`, after which adapters may hold a part of them.
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
    if checkpoint_activations:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if adapters is None:
        return Built(SupervisedLM(model, objective), weights, None)
    grown, base_path = room is not None, saved_path(random_base if source.init == "random" else source.path)
    adapted = add_lora(model, adapters, base_path=base_path, new_tokens=new_tokens, grown=grown)
    start = LoraStart(adapters.init, source.seed)
    if adapters.start_from is not None:
        stored = _stored(adapted, adapters.start_from)
        start.copies = {name: value for name, value in stored.items() if COPY in name}
        start.stored = {name: value for name, value in stored.items() if COPY not in name}
    network = SupervisedLM(adapted, objective)
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


def build_causal_lm(source: ModelSource) -> PreTrainedModel:
    """The base model, in the asked dtype whatever its files hold, in training mode.

    A random model is drawn in float32 from ``source.seed`` alone: the same bits in every layout.

    Raises:
        UserError: weights that are missing, damaged or of other shapes.
    """
    key = "model.pretrained_model_path"
    config = load_config(source.path, source.model_type, source.trust_remote_code)
    loaded: Any
    try:
        if source.init == "random":
            model = sketch(config, source.dtype, **model_options(source, config))
            materialise(model, DrawnWeights(deepcopy(model), source.dtype, source.seed))
            return model
        loaded = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=source.dtype, output_loading_info=True, **model_options(source, config)
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        hint = "For a model without weights set model.init: random."
        if "attention" in str(error):
            hint = "Another model.attn_implementation may do: eager."
        raise UserError(
            f"{key}: the model in {source.path!r} cannot be loaded ({first_line(error)}). {hint}"
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{key}: {source.path} lacks {len(missing)} weights of the model, first {missing[0]}.")
    return model.train()


def sketch_causal_lm(source: ModelSource) -> tuple[PreTrainedModel, Weights]:
    """The base model of :func:`build_causal_lm` on the meta device, and the weights it is to have."""
    config = load_config(source.path, source.model_type, source.trust_remote_code)
    try:
        model = sketch(config, source.dtype, **model_options(source, config))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"model: cannot be made from {source.path!r} ({first_line(error)}).") from error
    if source.init == "random":
        return model, DrawnWeights(deepcopy(model), source.dtype, source.seed)
    saved = saved_generation_config(source.path, f"model.pretrained_model_path: {source.path}")
    model.generation_config = saved or model.generation_config
    return model, StoredWeights(deepcopy(model), source.dtype, source.path)


def model_options(source: ModelSource, config: PretrainedConfig) -> dict[str, Any]:
    """What transformers is told beside a model's configuration."""
    sliced = source.attn_implementation == "sdpa" and config.model_type in SLICED_MODEL_TYPES
    return {
        "attn_implementation": SDPA_BY_CONVERSATION if sliced else source.attn_implementation,
        "trust_remote_code": source.trust_remote_code,
    }


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


def is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


def adapter_base(directory: Path) -> object:
    """The base model that a saved adapter names, if it names one.

    Raises:
        UserError: its configuration is damaged.
    """
    return _saved_config(directory).get("base_model_name_or_path")


def saved_whole(directory: Path) -> list[str]:
    """The modules that a saved adapter holds whole, as it names them.

    Raises:
        UserError: its configuration is damaged.
    """
    return list(_saved_config(directory).get("modules_to_save") or [])


def _saved_config(directory: Path) -> dict[str, Any]:
    file = directory / "adapter_config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)}).") from error
