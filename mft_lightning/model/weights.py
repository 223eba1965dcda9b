"""Where a model's weights come from, one module at a time, so that nobody needs to hold them all.

A model is sketched on the meta device, which has shapes and no values. Its modules get their values from here: all at
once, or layer by layer while a strategy shards what it has. What is drawn at random in a module depends on the seed and
the module's name alone, so that it is the same whoever draws it, and in which order.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from copy import copy, deepcopy
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mft_lightning.errors import NotYetError, UserError
from mft_lightning.model.adapters import in_adapter, in_base
from mft_lightning.model.seeding import one_thread, seeded
from mft_lightning.model.weight_files import UNREADABLE, open_weights, why_unreadable

KEY = "model.pretrained_model_path"


def sketch(config: PretrainedConfig, dtype: torch.dtype, **options: object) -> PreTrainedModel:
    """A causal LM on the meta device, in training mode.

    Args:
        config: of the model.
        dtype: of its parameters.
        options: more of ``from_config``.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    return model.train()


class Weights(Mapping[str, Tensor]):
    """The values of a model's modules; as a mapping, of its ``state_dict``, what is tied once.

    Args:
        model: a sketch, which stays one.
        dtype: of the parameters.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype

    @abstractmethod
    def of(self, name: str) -> dict[str, Tensor]:
        """The parameters and buffers that stand directly in the module of that name, whole, in host memory."""

    def __getitem__(self, name: str) -> Tensor:
        module, _, key = name.rpartition(".")
        return self.of(module)[key]

    def __iter__(self) -> Iterator[str]:
        tied = self.model.all_tied_weights_keys
        return (name for name in self.model.state_dict() if name not in tied)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _initial(self, name: str) -> nn.Module:
        """The module of that name, without its children, as transformers initialises it: in float32."""
        own = copy(self.model.get_submodule(name))
        own._parameters = {key: _parameter(value) for key, value in own._parameters.items()}
        own._buffers = {
            key: None if value is None else torch.empty_like(value, device="cpu") for key, value in own._buffers.items()
        }
        with torch.no_grad():
            self._initialiser(name)._init_weights(own)
        return own

    def _initialiser(self, name: str) -> PreTrainedModel:
        """The innermost transformers model that a module stands in."""
        found, inner = self.model, cast(nn.Module, self.model)
        for part in name.split(".") if name else ():
            inner = getattr(inner, part)
            found = inner if isinstance(inner, PreTrainedModel) else found
        return found


class DrawnWeights(Weights):
    """A random draw, as transformers initialises the model, made in float32 and then rounded.

    Args:
        model: a sketch.
        dtype: of the parameters.
        seed: of the draw.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, seed: int) -> None:
        super().__init__(model, dtype)
        self.seed = seed

    def of(self, name: str) -> dict[str, Tensor]:
        with seeded(self.seed, name):
            own = self._initial(name)
        parameters = {key: value.detach().to(self.dtype) for key, value in own._parameters.items() if value is not None}
        return parameters | {key: value for key, value in own._buffers.items() if value is not None}


class StoredWeights(Weights):
    """The weights of a model directory or hub id.

    Args:
        model: a sketch.
        dtype: of the parameters, whatever the files hold.
        path: the directory or id.
        where: what an error says of it, where it is a checkpoint, which may well hold what is not finite. Default: the
            key of the base model, and the path.

    Raises:
        UserError: files that are missing, damaged or of another model.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, path: str, where: str | None = None) -> None:
        super().__init__(model, dtype)
        self.where, self.checked = where or f"{KEY}: {path}", where is None
        try:
            self._files = open_weights(path)
        except UNREADABLE as error:
            hint = " For a model without weights set model.init: random." if where is None else ""
            raise UserError(f"{self.where}: the weights cannot be loaded ({why_unreadable(error)}).{hint}") from error
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._places = {name: place for place, name in live_names(self._files.names(), model) if name in expected}
        missing = sorted(expected.keys() - self._places.keys() - model.all_tied_weights_keys.keys())
        if missing:
            raise UserError(f"{self.where} lacks {len(missing)} weights of the model, first {missing[0]}.")
        for name, place in self._places.items():
            if (shape := self._files.shape(place)) != expected[name]:
                raise UserError(f"{self.where} has a {name} of {shape}, the model one of {expected[name]}.")

    def of(self, name: str) -> dict[str, Tensor]:
        own, values = self.model.get_submodule(name), {}
        if own._non_persistent_buffers_set:
            values = {key: value for key, value in self._initial(name)._buffers.items() if value is not None}
        for key in [*own._parameters, *own._buffers]:
            if (place := self._places.get(f"{name}.{key}" if name else key)) is not None:
                values[key] = self._read(place)
        return values

    def __getitem__(self, name: str) -> Tensor:
        return self._read(self._places[name])

    def check(self) -> None:
        """Read everything once, so that what is damaged is told before a run writes anything."""
        for place in self._places.values():
            self._read(place)

    def _read(self, place: str) -> Tensor:
        try:
            value = self._files.read(place)
        except UNREADABLE as error:
            raise UserError(f"{self.where}: {place} cannot be read ({why_unreadable(error)}).") from error
        if not value.is_floating_point():
            return value
        value = value.to(self.dtype).contiguous()
        if self.checked and not all(bool(end.isfinite()) for end in value.aminmax()):  # which passes NaN on
            raise UserError(f"{self.where}: {place} is not finite; the weights are damaged.")
        return value


class GrownWeights(Weights):
    """Weights whose embeddings, and the head, have rows for more tokens than the model they are from.

    transformers draws new rows like the old ones, and needs all of these for it. It does so here with a model that has
    embeddings and a head, but no layers.

    Args:
        weights: before they grow.
        tokens: rows that are needed.
        multiple_of: of which there will be a multiple.
        seed: of the draw.
    """

    def __init__(self, weights: Weights, tokens: int, multiple_of: int | None, seed: int) -> None:
        self.weights, self.tokens, self.multiple_of, self.seed = weights, tokens, multiple_of, seed
        grown = deepcopy(weights.model)
        grown.resize_token_embeddings(tokens, pad_to_multiple_of=multiple_of, mean_resizing=False)
        super().__init__(grown, weights.dtype)

    def of(self, name: str) -> dict[str, Tensor]:
        module = self.model.get_submodule(name)
        if module not in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            return self.weights.of(name)
        bare = sketch(without_layers(self.weights.model.config), self.dtype)
        materialise(bare, self.weights)
        grow_embeddings(bare, self.tokens, self.multiple_of, self.seed)
        return {key: value.detach() for key, value in bare.get_submodule(name)._parameters.items() if value is not None}


def grow_embeddings(model: PreTrainedModel, tokens: int, multiple_of: int | None, seed: int) -> None:
    """Give a model rows for ``tokens`` tokens, the new ones drawn like the old ones."""
    with seeded(seed), one_thread():
        model.resize_token_embeddings(tokens, pad_to_multiple_of=multiple_of)


def without_layers(config: PretrainedConfig, layers: int = 0) -> PretrainedConfig:
    """The configuration of the same model with fewer layers, or none."""
    fewer = deepcopy(config)
    text = fewer.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return fewer


def live_names(places: list[str], model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Names in files with the live ones, by transformers' rules.

    Raises:
        NotYetError: a model whose weights it also joins or splits when it loads them.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    live = model.state_dict()
    for place in places:
        name, converted = rename_source_key(place, renamings, converters, model.base_model_prefix, live)
        if name not in live and place in live:  # a rule for an older file met a newer one
            name, converted = place, None
        if converted is not None:
            kind = model.config.model_type
            raise NotYetError("trainer.strategy", "fsdp", f"Weights of {kind} come in other parts; use ddp.")
        yield place, name


def materialise(model: nn.Module, weights: Weights, within: nn.Module | None = None) -> None:
    """Give what is still on the meta device its values, in host memory; not adapters, which the weights have none of.

    Args:
        model: the model, by whose names of modules ``weights`` knows them, with or without adapters.
        weights: of it.
        within: the part of it; all if left out.
    """
    wanted = None if within is None else set(within.modules())
    made: dict[nn.Parameter, nn.Parameter] = {}  # what is tied stays so
    for name, owner in model.named_modules():
        if (wanted is not None and owner not in wanted) or in_adapter(name) or not _is_sketched(owner):
            continue
        values = weights.of(in_base(name))
        for key, parameter in owner._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in made:
                made[parameter] = filled(parameter, values[key])
            owner._parameters[key] = made[parameter]
        owner._buffers.update({key: values[key] for key, buffer in owner._buffers.items() if buffer is not None})


def filled(sketched: nn.Parameter, value: Tensor) -> nn.Parameter:
    """A parameter of the sketched one's kind; bitsandbytes' kinds quantise what they are given when it is moved."""
    if type(sketched) is nn.Parameter:
        return nn.Parameter(value, requires_grad=sketched.requires_grad)
    return cast(nn.Parameter, type(sketched)(value, requires_grad=False, **vars(sketched)).to(value.device))


def _is_sketched(module: nn.Module) -> bool:
    own = [*module._parameters.values(), *module._buffers.values()]
    return any(tensor is not None and tensor.is_meta for tensor in own)


def _parameter(sketched: nn.Parameter | None) -> nn.Parameter | None:
    """Room for its values, in float32."""
    if sketched is None:
        return None
    return nn.Parameter(torch.empty_like(sketched, device="cpu", dtype=torch.float32), requires_grad=False)
