"""What of a model is an adapter, told without importing peft, which a run without them need not wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from peft import PeftModel

ORIGINAL, COPY = ".original_module", ".modules_to_save.default"  # of a module that trains whole


def has_adapters(model: Any) -> TypeGuard[PeftModel]:
    """Whether peft wraps the model: its wrapper alone has a base model to get."""
    return hasattr(model, "get_base_model")


def in_base(name: str) -> str:
    """The name, before adapters were added, of the module or tensor whose values one begins with or stands for."""
    for part in (".base_layer", ORIGINAL, COPY):
        name = name.replace(part, "")
    return name


def in_adapter(name: str) -> bool:
    """Whether a module or a tensor of that name is peft's, beside a layer of the base."""
    return ".lora_" in name
