"""The model of a run: base weights or a random draw, full or LoRA. The one place where these differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mft_lightning.errors import NotYetError, UserError, first_line
from mft_lightning.model.attention import SDPA_BY_CONVERSATION, SLICED_MODEL_TYPES
from mft_lightning.model.buffers import unsaved_buffers_kept
from mft_lightning.model.objective import Objective
from mft_lightning.model.probe import check_assumptions
from mft_lightning.model.settings import LoraSettings
from mft_lightning.model.supervised_loss import SupervisedLM

if TYPE_CHECKING:
    from peft import PeftModel

LORA_TARGETS = {"gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}
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


def make_network(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapters: LoraSettings | None,
    objective: Objective,
    random_base: str,
    checkpoint_activations: bool,
    pad_vocab_to_multiple_of: int | None,
    packed: bool,
) -> SupervisedLM:
    """The network of a run, from its base to its adapters, tried out on what training takes for granted.

    Args:
        source: the base model.
        tokenizer: that the embeddings must have room for.
        adapters: their settings; None trains all weights.
        objective: what is minimised of a token.
        random_base: the directory that adapters name as their base where the base is a random draw.
        checkpoint_activations: whether the backward pass computes activations again.
        pad_vocab_to_multiple_of: of rows that embeddings grow to, where they must.
        packed: whether rows will be packed.

    Raises:
        UserError: a model that cannot be loaded, or that does not do what training takes for granted.
    """
    model = build_causal_lm(source)
    frozen = adapters is not None
    fit_tokenizer(model, tokenizer, multiple_of=pad_vocab_to_multiple_of, seed=source.seed, frozen=frozen)
    if checkpoint_activations:
        model.activation_checkpointing_enable({"use_reentrant": False})
    network = SupervisedLM(model, objective)
    check_assumptions(network, packed=packed)
    if adapters is None:
        return network
    base_path = saved_path(random_base if source.init == "random" else source.path)
    return SupervisedLM(add_lora(model, adapters, base_path=base_path, seed=source.seed), objective)


def build_causal_lm(source: ModelSource) -> PreTrainedModel:
    """The base model, in the asked dtype whatever its files hold, in training mode.

    A random model is drawn in float32 from ``source.seed`` alone: the same bits in every layout.

    Raises:
        UserError: weights that are missing, damaged or of other shapes.
    """
    key = "model.pretrained_model_path"
    config = load_config(source.path, source.model_type, source.trust_remote_code)
    sliced = source.attn_implementation == "sdpa" and config.model_type in SLICED_MODEL_TYPES
    options: dict[str, Any] = {
        "attn_implementation": SDPA_BY_CONVERSATION if sliced else source.attn_implementation,
        "trust_remote_code": source.trust_remote_code,
    }
    loaded: Any
    try:
        if source.init == "random":
            with seeded(source.seed):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
            with unsaved_buffers_kept(model):
                return model.to(source.dtype).train()
        loaded = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=source.dtype, output_loading_info=True, **options
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


def fit_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, multiple_of: int | None, seed: int, frozen: bool
) -> None:
    """Grow the embeddings where the tokenizer needs it, and write its eos and pad tokens into the generation config.

    Raises:
        UserError: the embeddings would have to grow, but they are ``frozen`` (LoRA) and the new rows never learn.
    """
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        if frozen:
            raise NotYetError(
                "model.peft_type",
                "lora",
                f"The tokenizer has {len(tokenizer)} tokens, the model {rows}: to grow embeddings, train all weights.",
            )
        with seeded(seed), _one_thread():  # else sums, and so the new rows, follow the number of threads
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple_of)
    generation = model.generation_config
    assert generation is not None
    generation.eos_token_id = tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id


def add_lora(model: PreTrainedModel, settings: LoraSettings, *, base_path: str, seed: int) -> PeftModel:
    """Freeze the model and wrap it with adapters.

    Args:
        model: the base; its weights are left as they are to the bit.
        settings: of the adapters.
        base_path: what the saved adapter names as its base.
        seed: of the adapters' random start.

    Raises:
        UserError: a target that is no layer of the model, or no known targets for its type.
    """
    from peft import LoraConfig, get_peft_model  # here for the start-up time of a run without adapters

    targets = settings.target_modules or LORA_TARGETS.get(model.config.model_type)
    if targets is None:
        raise UserError(f"model.lora.target_modules: not known for {model.config.model_type}; name the linear layers.")
    layers = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if unknown := [target for target in targets if target.rpartition(".")[2] not in layers]:
        raise UserError(f"model.lora.target_modules: {unknown} is none of the linear layers {sorted(layers)}.")
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft multiplies by it; any number works
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    model.name_or_path = base_path  # what peft writes into the adapter's configuration
    with seeded(seed):
        return cast("PeftModel", get_peft_model(model, config, autocast_adapter_dtype=False).train())


def saved_path(path: str) -> str:
    """A path as a saved adapter should name it: absolute where it is a directory, a hub id as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Trainable and total parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` on the CPU and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


def adapter_base(directory: Path) -> str:
    """The base model that a saved adapter names."""
    return json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
