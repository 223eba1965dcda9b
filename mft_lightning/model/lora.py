"""LoRA adapters: what peft is told of them, and where they are put. Their values come from ``lora_start.py``."""

from __future__ import annotations

import json
import warnings
from copy import copy
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PreTrainedModel

from mft_lightning.errors import UserError, first_line, nearest
from mft_lightning.model.saved_adapter import peft_config
from mft_lightning.model.settings import LoraSettings
from mft_lightning.model.whole_modules import whole_modules
from mft_lightning.shipped import expanded

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

LORA_TARGETS = {"gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}

# keys of model.lora, and what peft calls them, that decide an adapter's shape and what it computes
SHAPE = {
    "r": "r",
    "alpha": "lora_alpha",
    "target_modules": "target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "modules_to_save": "modules_to_save",
}
# what else of a saved adapter's configuration chooses its layers, which peft does
CHOICE = ("exclude_modules", "layers_to_transform", "layers_pattern")
# what is of no account when its weights are there, or is set anew
OF_NO_ACCOUNT = ("lora_dropout", "init_lora_weights", "inference_mode", "runtime_config", "eva_config")
IN_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to begin that leave the base another one


def add_lora(
    model: PreTrainedModel, settings: LoraSettings, *, base_path: str, new_tokens: int = 0, grown: bool = False
) -> PeftModel:
    """Freeze the model and wrap it with adapters, which are on the meta device until they are filled.

    Args:
        model: the base; its weights are left as they are to the bit.
        settings: of the adapters.
        base_path: what the saved adapter names as its base.
        new_tokens: tokens that are new to the base; embeddings and head train whole for them, unless told otherwise.
        grown: whether the base had to get rows for them.

    Raises:
        UserError: a target that is no layer of the model, no known targets for its type, a pattern that no target
            matches, a module that cannot train whole, or an adapter to start from that cannot be trained.
    """
    from peft import get_peft_model  # here for the start-up time of a run without adapters

    config = adapter_config(settings)
    if config.target_modules is None:
        config.target_modules = LORA_TARGETS.get(model.config.model_type)
    if config.target_modules is None:
        raise UserError(f"model.lora.target_modules: not known for {model.config.model_type}; name the linear layers.")
    if settings.start_from is None:
        layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        ends = sorted({name.rpartition(".")[2] for name in layers})
        if unknown := [
            end for end in config.target_modules if not any(f".{name}".endswith(f".{end}") for name in layers)
        ]:
            raise UserError(
                f"model.lora.target_modules: {unknown} is none of the linear layers {ends}.{nearest(unknown[0], ends)}"
            )
    targets = [] if isinstance(config.target_modules, str) else list(config.target_modules)
    config.modules_to_save = _whole(model, settings, config, targets, new_tokens=new_tokens, grown=grown) or None
    tied = {name.removesuffix(".weight") for name in model.all_tied_weights_keys}
    model.name_or_path = base_path  # what peft writes into the adapter's configuration
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern")  # which is refused below
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:  # an adapter to start from that is damaged, or of another model
        key = "" if settings.start_from is None else f".start_from: {settings.start_from}"
        raise UserError(f"model.lora{key}: peft cannot put this on the model ({first_line(error)}).") from error
    _check_layers(cast(Any, adapted), settings, tied)
    cast(Any, adapted).peft_config["default"].init_lora_weights = settings.peft_init
    for layer in adapted.modules():
        if hasattr(layer, "reset_lora_parameters"):
            for matrix in factors(layer):
                matrix.to(model.dtype)
    return cast("PeftModel", adapted.train())


def _whole(
    model: PreTrainedModel, settings: LoraSettings, config: Any, targets: list[str], *, new_tokens: int, grown: bool
) -> list[str]:
    """The modules that train whole: those of another adapter, where there is one to start from."""
    if settings.start_from is None:
        return whole_modules(model, settings.modules_to_save, targets, new_tokens=new_tokens, grown=grown)
    try:
        return whole_modules(model, config.modules_to_save or [], targets, new_tokens=new_tokens, grown=grown)
    except UserError as error:
        raise UserError(f"model.lora.start_from: {settings.start_from} cannot be trained here: {error}") from error


def modules_to_save(settings: LoraSettings) -> list[str]:
    """The modules that are said to train whole, by the settings or by the adapter to start from."""
    if settings.start_from is None:
        return settings.modules_to_save or []
    return list(adapter_config(settings).modules_to_save or [])


def factors(layer: Any) -> list[Any]:
    """The two factors of an adapted layer, as linear layers."""
    return [layer.lora_A["default"], layer.lora_B["default"]]


def adapter_config(settings: LoraSettings) -> LoraConfig:
    """What peft is told of a run's adapters, before anything is known of the model.

    Raises:
        UserError: the adapter to start from cannot be read or trained, or contradicts another key.
    """
    start = settings.start_from
    config = _new(settings) if start is None else _continued(settings, start)
    # of several that match a layer peft takes the first, and saves them in this order
    config.rank_pattern = dict(sorted((config.rank_pattern or {}).items()))
    config.alpha_pattern = dict(sorted((config.alpha_pattern or {}).items()))
    return config


def _new(settings: LoraSettings) -> LoraConfig:
    from peft import LoraConfig  # here for the start-up time of a run without adapters

    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft multiplies by it; any number works
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        rank_pattern=dict(settings.rank_pattern or {}),
        alpha_pattern=dict(settings.alpha_pattern or {}),
        task_type="CAUSAL_LM",
    )


def _continued(settings: LoraSettings, directory: str) -> LoraConfig:
    """The configuration of an adapter that is there, to train on."""
    from peft import LoraConfig, PeftConfig  # here for the start-up time of a run without adapters

    key = f"model.lora.start_from: {directory}"
    if not (expanded(directory) / "adapter_config.json").is_file():
        raise UserError(
            f"{key} holds no adapter. Give a directory with an adapter_config.json. Where it is gone, and the "
            "run goes on, a checkpoint of the run has the same shape: give that."
        )
    try:
        written = dict(json.loads((expanded(directory) / "adapter_config.json").read_text(encoding="utf-8")))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unexpected keyword arguments")  # which are refused below
            saved = peft_config(expanded(directory))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{key}: its adapter_config.json cannot be read ({first_line(error)}).") from error
    if not isinstance(saved, LoraConfig):
        raise UserError(f"{key} is an adapter of peft's {saved.peft_type}; only LoRA's can be trained.")
    known = {field.name for field in fields(saved)}
    if newer := sorted(name for name, value in written.items() if name not in known and value):
        raise UserError(f"{key} has {', '.join(newer)}, which this version of peft does not know.")
    _check_shape(key, saved)
    begun = str(saved.init_lora_weights).lower()
    if begun.startswith(IN_THE_BASE):
        raise UserError(
            f"{key} was begun with init_lora_weights: {begun}, which changes the base. Save it again by peft's "
            "save_pretrained with path_initial_model_for_weight_conversion."
        )
    plain, general = LoraConfig(), {field.name for field in fields(PeftConfig)}
    carried = {*SHAPE.values(), *CHOICE, *OF_NO_ACCOUNT, *general}
    if others := [f.name for f in fields(saved) if f.name not in carried and _differ(plain, saved, f.name)]:
        raise UserError(f"{key} has {', '.join(others)}, which cannot be trained here.")
    config, unset = copy(saved), LoraSettings()
    for name, theirs in SHAPE.items():
        ours, kept = getattr(settings, name), getattr(config, theirs)
        same = set(ours) == set(kept or []) if isinstance(ours, list) else ours == kept
        if ours != getattr(unset, name) and not same:
            said = sorted(kept) if isinstance(kept, set) else kept
            raise UserError(f"model.lora.{name}: is {ours}, but {said} in {directory}. Leave it out.")
    config.lora_dropout, config.init_lora_weights, config.inference_mode = settings.dropout, True, False
    config.base_model_name_or_path, config.revision, config.task_type = None, None, "CAUSAL_LM"
    return config


def _check_shape(key: str, saved: Any) -> None:
    """Raise where what a saved configuration says of an adapter's shape is none."""
    try:
        for key_of_names in ("target_modules", "modules_to_save"):
            if not all(isinstance(name, str) for name in getattr(saved, key_of_names) or []):
                raise TypeError(f"{key_of_names} has what is no name")
        LoraSettings(
            r=saved.r, alpha=saved.lora_alpha, rank_pattern=saved.rank_pattern, alpha_pattern=saved.alpha_pattern
        )
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{key}: its adapter_config.json cannot be used ({first_line(error)}).") from error


def _differ(plain: Any, saved: Any, name: str) -> bool:
    return bool((getattr(saved, name) or None) != (getattr(plain, name) or None))


def _check_layers(adapted: Any, settings: LoraSettings, tied: set[str]) -> None:
    """Adapters can be trained on linear layers alone; every pattern must decide something of one of these."""
    config = adapted.peft_config["default"]
    layers = {name: adapted.base_model.model.get_submodule(name) for name in adapted.base_model.targeted_module_names}
    if others := [name for name, layer in layers.items() if not isinstance(layer.get_base_layer(), nn.Linear)]:
        raise UserError(f"model.lora.start_from: its target {others[0]} is no linear layer, which cannot be trained.")
    for key in ("rank_pattern", "alpha_pattern"):
        if settings.start_from is None:
            _check_patterns(f"model.lora.{key}", list(getattr(config, key)), list(layers))
    if settings.changes_base:
        for name, layer in layers.items():
            if (rank := layer.r["default"]) > (most := min(layer.in_features, layer.out_features)):
                key = "r" if rank == config.r else "rank_pattern"
                raise UserError(
                    f"model.lora.{key}: {rank} is more than {name}'s {most} singular values of model.lora.init."
                )
            if name in tied:
                raise UserError(f"model.lora.init: {settings.init} changes {name}, which is tied to the embeddings.")


def _check_patterns(key: str, patterns: list[str], layers: list[str]) -> None:
    from peft.utils.other import get_pattern_key

    decisive = {get_pattern_key(patterns, name) for name in layers}
    for pattern in patterns:
        if pattern in decisive:
            continue
        if any(get_pattern_key([pattern], name) == pattern for name in layers):
            raise UserError(
                f"{key}: {pattern!r} decides nothing: every layer that it matches is matched by one before it in "
                "alphabetical order, in which peft reads them. Let that one match fewer layers."
            )
        raise UserError(f"{key}: {pattern!r} is no name, or end of one, of a layer with an adapter, like {layers[0]}.")


def check_adapters(settings: LoraSettings, tensor_parallel_size: int, *, quantized: bool) -> None:
    """Raise where a run cannot train its adapters, without reading any weights.

    Args:
        settings: of the adapters.
        tensor_parallel_size: devices that share a layer.
        quantized: whether the base is.
    """
    if not adapter_config(settings).use_dora:
        return
    key = "model.lora.use_dora: needs the norms of whole matrices, "
    if tensor_parallel_size > 1:
        raise UserError(
            f"{key}of which parallel.tensor_parallel_size leaves each device a part. Leave one of them out."
        )
    if quantized:
        raise UserError(f"{key}which model.peft_type: qlora quantises. Use lora, or leave it out.")


def describe_adapter(config: Any) -> str:
    """What decides an adapter's shape and what it computes, in one line; what is left at its default is not said."""
    targets = config.target_modules
    named = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    said = [f"r {config.r}, alpha {config.lora_alpha:g}, on {named}"]
    if config.modules_to_save:
        said.append(f"whole: {', '.join(sorted(config.modules_to_save))}")
    said += [key for key in ("use_rslora", "use_dora") if getattr(config, key)]
    for key in ("rank_pattern", "alpha_pattern", *CHOICE):
        if value := getattr(config, key):
            said.append(f"{key} {_in_order(value)}")
    if isinstance(config.init_lora_weights, str):
        said.append(f"init {config.init_lora_weights}")
    return ", ".join(said)


def _in_order(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(sorted(value.items()))
    return sorted(value) if isinstance(value, (set, list, tuple)) else value
