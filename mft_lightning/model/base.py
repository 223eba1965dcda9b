"""The frozen base of an adapter, tensor by tensor: told from others, and found again in a directory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mft_lightning.errors import UserError
from mft_lightning.model.adapters import COPY, has_adapters, in_adapter, in_base
from mft_lightning.model.weight_files import UNREADABLE, open_weights
from mft_lightning.model.weights import live_names

if TYPE_CHECKING:
    from peft import PeftModel


def base_state(model: PeftModel | PreTrainedModel, rows: int | None = None) -> dict[str, Tensor]:
    """The frozen base's tensors by the names they had before adapters were added; what is tied, once.

    Args:
        model: the base, with adapters or before they are added.
        rows: of embeddings and head in the base, where it has more of them by now.
    """
    base = cast(PreTrainedModel, model.get_base_model() if has_adapters(model) else model)
    state = base.state_dict()
    named = {in_base(name): tensor for name, tensor in state.items() if not in_adapter(name) and COPY not in name}
    grown: set[Any] = set()
    if rows is not None:
        ends = (base.get_input_embeddings(), base.get_output_embeddings())
        grown = {
            in_base(f"{path}.{key}") for path, end in base.named_modules() if end in ends for key in end.state_dict()
        }
    return {
        name: tensor[:rows] if name in grown else tensor
        for name, tensor in named.items()
        if name not in base.all_tied_weights_keys
    }


def base_digest(base: Mapping[str, Tensor]) -> str:
    """A digest of a base's bits, in whatever order they come; one tensor at a time is in memory.

    Args:
        base: of :func:`base_state`, or the :class:`~mft_lightning.model.weights.Weights` it will have.
    """
    parts = []
    for name, tensor in base.items():
        bits = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        bits.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)  # not a copy
        parts.append(bits.digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()[:16]


def holds(directory: Path, base: Mapping[str, Tensor], model: PreTrainedModel) -> bool:
    """Whether a directory holds these very weights of a model, bit for bit."""
    try:
        files = open_weights(str(directory))
        places = {name: place for place, name in live_names(files.names(), model)}
        if not base.keys() <= places.keys():
            return False
        found = ((files.read(places[name]), tensor.cpu()) for name, tensor in base.items())
        return all(ours.dtype == theirs.dtype and torch.equal(ours, theirs) for ours, theirs in found)
    except (*UNREADABLE, UserError):
        return False
