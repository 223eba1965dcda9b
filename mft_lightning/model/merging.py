"""An adapter and its base as one model, made a module at a time by peft's own layers."""

from __future__ import annotations

import warnings
from copy import copy, deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from mft_lightning.errors import NotYetError, UserError, first_line
from mft_lightning.model.saved_adapter import peft_config
from mft_lightning.model.weight_files import UNREADABLE, open_adapter, why_unreadable
from mft_lightning.model.weights import StoredWeights, Weights, sketch
from mft_lightning.model.whole_modules import IN_FILES, make_room

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"  # peft's name for it in a model


def read_base(path: str, dtype: torch.dtype | None, where: str) -> Weights:
    """The base of an adapter, of which nothing is read yet.

    Args:
        path: a directory or hub id.
        dtype: it was trained on in. None: the one it is saved in.
        where: what messages call it.

    Raises:
        UserError: there is no such model, or no weights of it, or they come in a form that is not merged into.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(f"{where}: is quantised already. Give the model that it was made from.")
        dtype = dtype or config.dtype or torch.float32
        return StoredWeights(sketch(config, dtype), dtype, path, where)
    except NotYetError as error:
        raise UserError(
            f"{where}: its files hold weights of a {config.model_type} in other parts than it computes with, which are "
            "not merged here. peft's merge_and_unload does it, with the whole model in memory."
        ) from error
    except (*UNREADABLE, StrictDataclassError) as error:
        raise UserError(f"{where}: cannot be loaded ({why_unreadable(error)}).") from error


class MergedWeights(Weights):
    """Base + adapter. One module at a time is in memory, and one read from the base.

    What peft changes is put together as peft does when it loads the adapter, and merged by peft, in float32 at least;
    the result is rounded once. Embeddings that the adapter holds may have other rows than the base's: the model has
    them then. Embeddings and a head that were one matrix are one no more where the adapter parts them.

    Args:
        directory: the adapter, as peft saves it.
        base: the weights it was trained on, in the dtype it was trained in.
        dtype: of the merged weights.
        device: that computes.
        where: what messages call the adapter.

    Raises:
        UserError: it cannot be read, is of another model, or is no LoRA adapter; and where a weight is asked for, that
            it is not finite.
    """

    def __init__(self, directory: Path, base: Weights, dtype: torch.dtype, device: torch.device, where: str) -> None:
        self.base, self.device, self.where = base, device, where
        self._computed_in = torch.promote_types(base.dtype, torch.float32)
        try:
            self._files = open_adapter(directory)
            self._config = _read_config(directory, where)
            make_room(grown := deepcopy(base.model), self._files)
            self._adapted = _adapted(grown, self._config)
        except UNREADABLE as error:
            raise UserError(f"{where}: cannot be put on its base ({why_unreadable(error)}).") from error
        self._places = self._matched()
        self._paths = {module: name for name, module in self._adapted.named_modules()}
        super().__init__(grown, dtype)
        self._made: tuple[str, dict[str, Tensor]] = ("", {})
        config = deepcopy(grown.config)
        if not self._is_still_tied():
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        self.model = sketch(config, dtype)
        self._check_rows()

    def of(self, name: str) -> dict[str, Tensor]:
        if self._made[0] != name or not self._made[1]:
            self._made = ("", {})  # gone before there is another
            self._made = name, self._rounded(name, self._merged(name))
        return self._made[1]

    def _merged(self, name: str) -> dict[str, Tensor]:
        """What stands directly in a module, as it was computed."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

        found: Any = self._adapted.get_submodule(IN_FILES + name if name else IN_FILES[:-1])
        if isinstance(found, ModulesToSaveWrapper):  # of which peft takes the copy that was trained
            found = found.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
        if isinstance(found, TrainableTokensWrapper) and (leader := found.token_adapter.tied_adapter) is not None:
            return self._merged(self._paths[leader].removeprefix(IN_FILES).removesuffix(".token_adapter"))
        if isinstance(found, (BaseTunerLayer, TrainableTokensWrapper)):
            return self._through_peft(name, found)
        own = [key for key, value in [*found._parameters.items(), *found._buffers.items()] if value is not None]
        path = self._paths[found]
        places = {key: self._places[f"{path}.{key}"] for key in own if f"{path}.{key}" in self._places}
        values = {} if len(places) == len(own) else self._of_base(name)
        return {key: self._read(places[key]) if key in places else values[key] for key in own}

    def _through_peft(self, name: str, sketched: Any) -> dict[str, Tensor]:
        """The weights of a layer that peft replaced, merged."""
        begin = f"{self._paths[sketched]}."
        places = {live.removeprefix(begin): place for live, place in self._places.items() if live.startswith(begin)}
        layer = deepcopy(sketched)
        inner = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
        if any(True for _ in inner.children()):
            raise UserError(f"{self.where}: {name} is a {type(inner).__name__}, whose adapters cannot be merged here.")
        _fill(inner, {key: self._computable(value) for key, value in self._of_base(name).items()})
        try:
            if isinstance(self._config.init_lora_weights, str):  # PiSSA and its like change the base when they begin
                layer.update_layer(ADAPTER, layer.r[ADAPTER], lora_alpha=layer.lora_alpha[ADAPTER], config=self._config)
            layer.load_state_dict(
                {key: self._computable(self._read(place)) for key, place in places.items()}, strict=False, assign=True
            )
            if hasattr(layer, "unload_and_optionally_merge_module"):
                inner = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                layer.merge()
        except (*UNREADABLE, NotImplementedError) as error:
            raise UserError(f"{self.where}: the adapter of {name} cannot be merged ({first_line(error)}).") from error
        tensors = [*inner._parameters.items(), *inner._buffers.items()]
        return {key: value.detach().cpu() for key, value in tensors if value is not None}

    def _computable(self, value: Tensor) -> Tensor:
        """A copy where it is computed, and in the dtype."""
        return value.to(self.device, self._computed_in if value.is_floating_point() else None, copy=True)

    def _rounded(self, name: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
        unsaved = self.model.get_submodule(name)._non_persistent_buffers_set
        rounded = {}
        for key, value in values.items():
            rounded[key] = value.to(self.dtype) if value.is_floating_point() and key not in unsaved else value
            if value.is_floating_point() and not all(bool(end.isfinite()) for end in rounded[key].aminmax()):
                raise UserError(self._not_finite(f"{name}.{key}", value))
        return rounded

    def _not_finite(self, name: str, value: Tensor) -> str:
        if all(bool(end.isfinite()) for end in value.aminmax()):
            largest, kind = float(value.abs().max()), str(self.dtype).removeprefix("torch.")
            return f"--dtype: {name} has a value of {largest:g}, which {kind} cannot hold. Take bfloat16 or float32."
        return f"{self.where}: merged, {name} is not finite: the adapter or its base is damaged, or training diverged."

    def _of_base(self, name: str) -> dict[str, Tensor]:
        """What the base has in a module, what is tied too."""
        values = self.base.of(name)
        for tied, source in self.base.model.all_tied_weights_keys.items():
            module, _, key = tied.rpartition(".")
            if module == name and key not in values:
                values[key] = self.base[source]
        return values

    def _read(self, place: str) -> Tensor:
        """A tensor of the adapter's file."""
        try:
            return self._files.read(place)
        except UNREADABLE as error:
            raise UserError(f"{self.where}: {place} cannot be read ({why_unreadable(error)}).") from error

    def _matched(self) -> dict[str, str]:
        """The adapter's names in its file by those of the live model, if they and the shapes are the same."""
        from peft import get_peft_model_state_dict

        live = self._adapted.state_dict()
        stand_ins = {name: torch.empty(0) for name in live}  # of which each is told from the others
        saved = get_peft_model_state_dict(self._adapted, state_dict=dict(stand_ins), save_embedding_layers=False)
        names = {id(tensor): name for name, tensor in stand_ins.items()}
        places = {names[id(tensor)]: place for place, tensor in saved.items()}
        there = set(self._files.names())
        more = there - saved.keys()  # embeddings that peft saved beside the adapter, if anything
        places |= {place: place for place in more if place in live}
        lacking, unknown = sorted(saved.keys() - there), sorted(more - places.keys())
        if lacking or unknown:
            what = f"lacks {lacking[0]}" if lacking else f"has {unknown[0]}, which the model has no place for"
            raise UserError(f"{self.where}: cannot be put on its base: it {what}.")
        for name, place in places.items():
            if (shape := self._files.shape(place)) != tuple(live[name].shape):
                raise UserError(
                    f"{self.where}: cannot be put on its base: {place} is of {shape}, of this base it would be "
                    f"{tuple(live[name].shape)}."
                )
        return places

    def _is_still_tied(self) -> bool:
        return all(
            torch.equal(self[tied], self[source])
            for tied, source in self.model.all_tied_weights_keys.items()
            if self._is_touched(tied) or self._is_touched(source)
        )

    def _is_touched(self, name: str) -> bool:
        module = IN_FILES + name.rpartition(".")[0]
        return any(place.startswith(f"{module}.") for place in self._places)

    def _check_rows(self) -> None:
        """Refuse an adapter that has new rows of some weights and not of all that got them."""
        had = self.base.model.state_dict()
        for name, value in self.model.state_dict().items():
            if tuple(value.shape) != tuple(had[name].shape) and not self._is_touched(name):
                raise UserError(
                    f"{self.where}: has embeddings for another number of tokens than its base, but no {name} for them."
                )


def _read_config(directory: Path, where: str) -> Any:
    """``adapter_config.json``, of a LoRA adapter."""
    try:
        config = peft_config(directory)
    except (*UNREADABLE, TypeError) as error:
        raise UserError(f"{where}: its adapter_config.json cannot be read ({first_line(error)}).") from error
    if (kind := getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise UserError(f"{where}: is a {kind} adapter. Only LoRA and its relatives are merged here.")
    if config.layer_replication:
        raise UserError(f"{where}: repeats layers of its base (layer_replication), which cannot be merged.")
    return config


def _adapted(model: PreTrainedModel, config: Any) -> PeftModel:
    """The sketch with its adapters, which take nothing from it that it does not have."""
    from peft import PeftModel

    started = copy(config)
    started.init_lora_weights, started.inference_mode = False, True
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True` and a tied layer")  # they are parted
        return PeftModel(model, started, ADAPTER, autocast_adapter_dtype=False)


def _fill(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Give a sketched module its values."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[key] = nn.Parameter(values[key], requires_grad=False)
    module._buffers.update({key: values[key] for key, buffer in module._buffers.items() if buffer is not None})
