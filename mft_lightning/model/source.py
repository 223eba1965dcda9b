"""Where a base model comes from: a directory, a hub id or a draw from a configuration; complete or a sketch."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mft_lightning.data.tokenizer import contradictory
from mft_lightning.errors import UserError, first_line
from mft_lightning.model.attention import SDPA_BY_CONVERSATION, SLICED_MODEL_TYPES
from mft_lightning.model.generation_file import saved_generation_config
from mft_lightning.model.weight_files import UNREADABLE, why_unreadable
from mft_lightning.model.weights import DrawnWeights, StoredWeights, Weights, materialise, sketch

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
    except UNREADABLE as error:
        hint = "For a model without weights set model.init: random."
        if "attention" in str(error):
            hint = "Another model.attn_implementation may do: eager."
        raise UserError(
            f"{key}: the model in {source.path!r} cannot be loaded ({why_unreadable(error)}). {hint}"
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
