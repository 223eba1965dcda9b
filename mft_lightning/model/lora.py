"""LoRA adapters: added to a base without values, and drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PreTrainedModel

from mft_lightning.errors import UserError
from mft_lightning.model.seeding import seeded
from mft_lightning.model.settings import LoraSettings
from mft_lightning.model.whole_modules import whole_modules

if TYPE_CHECKING:
    from peft import PeftModel

LORA_TARGETS = {"gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}


def add_lora(
    model: PreTrainedModel, settings: LoraSettings, *, base_path: str, new_tokens: int = 0, grown: bool = False
) -> PeftModel:
    """Freeze the model and wrap it with adapters, which are on the meta device until :func:`draw_adapters`.

    Args:
        model: the base; its weights are left as they are to the bit.
        settings: of the adapters.
        base_path: what the saved adapter names as its base.
        new_tokens: tokens that are new to the base; embeddings and head train whole for them, unless told otherwise.
        grown: whether the base had to get rows for them.

    Raises:
        UserError: a target that is no layer of the model, or no known targets for its type; a module that cannot train
            whole.
    """
    from peft import LoraConfig, get_peft_model  # here for the start-up time of a run without adapters

    targets = settings.target_modules or LORA_TARGETS.get(model.config.model_type)
    if targets is None:
        raise UserError(f"model.lora.target_modules: not known for {model.config.model_type}; name the linear layers.")
    layers = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if unknown := [target for target in targets if target.rpartition(".")[2] not in layers]:
        raise UserError(f"model.lora.target_modules: {unknown} is none of the linear layers {sorted(layers)}.")
    whole = whole_modules(model, settings.modules_to_save, targets, new_tokens=new_tokens, grown=grown)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft multiplies by it; any number works
        lora_dropout=settings.dropout,
        target_modules=targets,
        modules_to_save=whole or None,
        task_type="CAUSAL_LM",
    )
    model.name_or_path = base_path  # what peft writes into the adapter's configuration
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    for layer in adapted.modules():
        if hasattr(layer, "reset_lora_parameters"):
            for matrix in _pair(layer):
                matrix.to(model.dtype)
    return cast("PeftModel", adapted.train())


def draw_adapters(model: PreTrainedModel, seed: int, within: nn.Module | None = None) -> None:
    """Give adapters their values: peft's draw for each layer, from the seed and the layer's name.

    Made in float32, then rounded to what the base is in.

    Args:
        model: the base with its adapters.
        seed: of the draw.
        within: the part of it; all if left out.
    """
    wanted = set((model if within is None else within).modules())
    dtype = model.dtype
    for name, layer in model.named_modules():
        if layer not in wanted or not hasattr(layer, "reset_lora_parameters"):
            continue
        adapted, pair = cast(Any, layer), _pair(layer)
        if not pair[0].weight.is_meta:  # drawn with another part
            continue
        for matrix in pair:
            matrix.to_empty(device="cpu").float()
        with seeded(seed, name):
            adapted.reset_lora_parameters("default", True)
        for matrix in pair:
            matrix.to(dtype)


def _pair(layer: Any) -> list[Any]:
    return [layer.lora_A["default"], layer.lora_B["default"]]
