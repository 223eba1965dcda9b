"""Whether a model carries adapters, told without importing peft, which a run without them need not wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from peft import PeftModel


def has_adapters(model: Any) -> TypeGuard[PeftModel]:
    """Whether peft wraps the model: its wrapper alone has a base model to get."""
    return hasattr(model, "get_base_model")
