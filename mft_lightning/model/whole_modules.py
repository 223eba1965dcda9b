"""Modules that train whole beside adapters (peft's ``modules_to_save``): which they are, and room for their rows.

peft leaves such a module as it is, frozen, and trains a copy in its place, which an adapter's files then hold.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from mft_lightning.errors import UserError
from mft_lightning.model.settings import LoraSettings
from mft_lightning.model.weight_files import UNREADABLE, TensorFiles, open_adapter, why_unreadable
from mft_lightning.shipped import expanded

KEY = "model.lora.modules_to_save"
IN_FILES = "base_model.model."  # before the base's names within peft's wrapper


def whole_modules(
    model: PreTrainedModel, asked: list[str] | None, targets: Collection[str], *, new_tokens: int, grown: bool
) -> list[str]:
    """The names of the modules that are to train whole.

    Args:
        model: the base, before adapters are added.
        asked: ``model.lora.modules_to_save``. None takes embeddings and head where tokens are new to the base.
        targets: names of the layers that get an adapter.
        new_tokens: how many tokens of the run's tokenizer the base has never seen.
        grown: whether the base lacks rows for them, and had to get some.

    Raises:
        UserError: what is no layer of the model, gets an adapter, or is tied to another; or rows were added, and would
            not be saved.
    """
    both = _embeddings(model)
    names = asked if asked is not None else both if new_tokens or grown else []
    own = {path: module for path, module in model.named_modules() if any(True for _ in module.parameters(False))}
    layers = {path for path, module in own.items() if not any(True for _ in module.children())}
    for name in dict.fromkeys([*names, *both] if grown else names):
        found = [path for path, _ in model.named_modules() if path.endswith(name)]  # as peft looks for them
        if not found or not all(path in layers and f".{path}".endswith(f".{name}") for path in found):
            known = sorted({path.rpartition(".")[2] for path in layers})
            raise UserError(f"{KEY}: {name!r} is none of the layers {', '.join(known)}.")
        if any(f".{path}".endswith(f".{target}") for path in found for target in targets):
            raise UserError(f"{KEY}: {name} gets an adapter (model.lora.target_modules). Name it in one of the two.")
        weights = {f"{path}.{key}" for path in found for key, _ in own[path].named_parameters()}
        if weights & {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}:
            remedy = "Leave it out"
            if asked is None:
                remedy = "Set it to [], so that new tokens keep the rows they have"
            if grown:
                text = ", data.role_tokens: text" if new_tokens else ""
                remedy = (
                    f"Rows must be added for the tokenizer's tokens, and train: use a base with room for them{text}"
                )
            raise UserError(
                f"{KEY}: {name} is tied: one matrix is the model's embeddings and its head, and a copy that trains "
                f"would part them. {remedy}, or train all weights (model.peft_type: null)."
            )
    given = {name.rpartition(".")[2] for name in names}
    if grown and (missing := [name for name in both if name not in given]):
        raise UserError(
            f"{KEY}: {names} leaves out {' and '.join(missing)}. The tokenizer has more tokens than the model, and "
            "rows that are added must train to be saved. Leave the key out."
        )
    return list(names)


def are_embeddings_whole(model: PreTrainedModel, names: Sequence[str]) -> bool:
    """Whether embeddings and head are among the names of modules that train whole."""
    return set(_embeddings(model)) <= {name.rpartition(".")[2] for name in names}


def _embeddings(model: PreTrainedModel) -> list[str]:
    """The names, within the modules they stand in, of a model's embeddings and head, whole already or not."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [path.rpartition(".")[2] for end in ends for path, module in model.named_modules() if module is end]


def in_force(module: nn.Module) -> nn.Module:
    """What computes in a module's place: its copy where it trains whole, else itself."""
    copies: Any = getattr(module, "modules_to_save", None)
    return module if copies is None else cast(nn.Module, copies["default"])


def make_room(model: PreTrainedModel, adapter: TensorFiles) -> None:
    """Give a base, in place, as many rows of embeddings as an adapter holds, where it holds them.

    Their values are of no account: the adapter has all of them. peft itself does not do it, and refuses.

    Args:
        model: the base without adapters, or a sketch of it.
        adapter: the tensors that peft saved.
    """
    for rows in rows_held(model, adapter) - {count_rows(model)}:
        model.resize_token_embeddings(rows, mean_resizing=False)


def rows_held(model: PreTrainedModel, adapter: TensorFiles) -> set[int]:
    """How many rows embeddings and head have in an adapter; none where it does not hold them.

    Args:
        model: the base without adapters, or a sketch of it.
        adapter: the tensors that peft saved.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = [IN_FILES + name for name, module in model.named_modules() if module in ends]
    held = {f"{path}{inner}.weight" for path in paths for inner in ("", ".base_layer")} & set(adapter.names())
    return {adapter.shape(place)[0] for place in held}


def count_rows(model: PreTrainedModel) -> int:
    """A model's embeddings."""
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


def find_room(
    model: PreTrainedModel, tokens: int, multiple_of: int | None, adapters: LoraSettings | None
) -> tuple[int, int | None] | None:
    """How many rows embeddings must get, and the number of which there are to be a multiple; None where they have them.

    Args:
        model: the base without adapters, or a sketch of it.
        tokens: of the tokenizer.
        multiple_of: of rows, where there must be more.
        adapters: of which one to start from may have rows for tokens: as many as it has there are to be.

    Raises:
        UserError: it has too few, or cannot be read.
    """
    start = None if adapters is None else adapters.start_from
    held: set[int] = set()
    if start is not None:
        try:
            held = rows_held(model, open_adapter(expanded(start)))
        except UNREADABLE as error:
            raise UserError(f"model.lora.start_from: {start}: cannot be read ({why_unreadable(error)}).") from error
    rows = max(held, default=count_rows(model))
    if start is not None and rows < tokens:
        raise UserError(
            f"model.lora.start_from: {start} has no rows for the tokenizer's {tokens} tokens, but for {rows}. Take the "
            "tokenizer that it was trained with; or merge it, and train another adapter of the merged model."
        )
    if rows > count_rows(model):
        return rows, None
    return (tokens, multiple_of) if tokens > count_rows(model) else None
