"""The trained model as a Hugging Face directory, and back into the live model's names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mft_lightning.errors import UserError
from mft_lightning.model.adapters import COPY, has_adapters
from mft_lightning.model.base import base_digest
from mft_lightning.model.config_file import add_older_names
from mft_lightning.model.lora import describe_adapter
from mft_lightning.model.lora_start import changes_base, over_whole_base, split_initial, with_initial
from mft_lightning.model.weight_files import UNREADABLE, open_adapter, why_unreadable
from mft_lightning.model.weights import sketch

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_FILE = "adapter_model.safetensors"
PART = 256 * 2**20  # bytes of a base's weights that are in memory at once, where one tensor is no larger


def trained_names(model: nn.Module) -> set[str]:
    """What a checkpoint holds of ``model``: everything, or of a LoRA model what trains."""
    if has_adapters(model):
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return set(model.state_dict())


class ModelWriter:
    """Writes states of a model as ``from_pretrained`` or ``PeftModel.from_pretrained`` reads them.

    Through a twin without storage: the live model may have been wrapped or renamed by a sharding strategy, and the
    names in the file follow the class (transformers) or the modules (peft). Made once; any thread may then write.

    Args:
        model: the live model, for its configuration.
        initial: of :class:`~mft_lightning.model.lora_start.LoraStart`; what adapters began with is saved beside them.
    """

    def __init__(self, model: nn.Module, initial: Mapping[str, Tensor] | None = None) -> None:
        self._adapted: PeftModel | None = None
        self._initial = initial or {}
        if has_adapters(model):
            self._adapted = _adapter_twin(model)
            return
        assert isinstance(model, PreTrainedModel)
        self._whole = twin(model)

    def __call__(self, state: dict[str, Tensor], directory: Path) -> None:
        """Write ``state``, tensors by the live model's names, into an existing directory."""
        if self._adapted is None:
            _save_through(self._whole, state, directory)
            return
        saved = {name: with_initial(name, tensor, self._initial) for name, tensor in state.items()}
        self._adapted.save_pretrained(str(directory), state_dict=saved, save_embedding_layers=False)
        _open_to_others(directory)
        (directory / "README.md").unlink(missing_ok=True)  # peft's empty model card

    def describe(self, directory: Path) -> None:
        """Write all but the weights."""
        names = trained_names(self._adapted) if self._adapted is not None else ()
        self({name: torch.empty(0) for name in names}, directory)
        (directory / ADAPTER_FILE).unlink(missing_ok=True)

    def place(self, name: str) -> str:
        """The name that a tensor of the live model has in a file."""
        return _adapter_place(name) if self._adapted is not None else _place(self._whole, name)


def save_causal_lm(model: PreTrainedModel, state: dict[str, Tensor], directory: Path) -> None:
    """Write ``state`` as ``from_pretrained`` reads it, in the live dtype; see :class:`ModelWriter`."""
    _save_through(twin(model), state, directory)


def _save_through(model: PreTrainedModel, state: dict[str, Tensor], directory: Path) -> None:
    # gathered one by one, tied weights no longer share the memory by which transformers knows them
    once = {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}
    model.save_pretrained(directory, state_dict=once)
    add_older_names(directory)
    _open_to_others(directory)


def save_base(model: PreTrainedModel, base: Mapping[str, Tensor], directory: Path) -> None:
    """Write a base as :func:`save_causal_lm` does, a part of the weights at a time.

    Args:
        model: of which the base is; its weights are not read.
        base: every tensor, made when it is asked for.
        directory: an existing one.
    """
    own = twin(model)
    own.save_pretrained(directory, state_dict={})  # configuration and generation config
    add_older_names(directory)
    places, state = {_place(own, name): name for name in base}, own.state_dict()
    write_parts({place: state[name] for place, name in places.items()}, lambda place: base[places[place]], directory)


def write_parts(shaped: dict[str, Tensor], read: Callable[[str], Tensor], directory: Path) -> None:
    """Write ``model.safetensors``, or several of them and their index, a file in memory at a time.

    Args:
        shaped: a tensor of the right shape and dtype for every name, whose values are not looked at.
        read: gives those of a name.
        directory: an existing one, with the model's configuration.
    """
    split = split_torch_state_dict_into_shards(
        shaped, filename_pattern=SAFE_WEIGHTS_NAME.replace(".", "{suffix}."), max_shard_size=PART
    )
    for file, held in split.filename_to_tensors.items():
        save_file({name: read(name).contiguous() for name in held}, directory / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _open_to_others(directory)


def _place(model: PreTrainedModel, name: str) -> str:
    """The name that a weight has in a file."""
    return next(iter(revert_weight_conversion(model, {name: model.state_dict()[name]})))


def _open_to_others(directory: Path) -> None:
    """Give weights the mode that files here have; safetensors keeps what it writes to the owner alone (0.8)."""
    mode = next(directory.glob("*config.json")).stat().st_mode
    for file in directory.glob("*.safetensors"):
        file.chmod(mode)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A sketch of the same model, with the generation config that it has now."""
    made = sketch(model.config, model.dtype)
    made.generation_config = deepcopy(model.generation_config)  # of the live model, generating changes it
    return made


def _adapter_twin(model: PeftModel) -> PeftModel:
    from peft import get_peft_model  # here for the start-up time of a run without adapters

    base: Any = model.get_base_model()
    own = twin(base)
    own.name_or_path = base.name_or_path
    config: Any = model.peft_config["default"]
    config = over_whole_base(config) if changes_base(config) else copy(config)
    with torch.device("meta"):
        adapted: Any = get_peft_model(own, config, autocast_adapter_dtype=False)
    return adapted


def _adapter_place(name: str) -> str:
    """The name that peft gives a tensor of an adapter in a file, without the adapter's own."""
    if "lora_magnitude_vector" in name:
        return name.removesuffix(".default.weight")
    return name.replace(COPY, "").replace(".default.", ".")


def load_state(model: nn.Module, directory: Path) -> dict[str, Tensor]:
    """The tensors of a saved model by the live model's names.

    Raises:
        UserError: the directory holds other weights than the model has.
    """
    try:
        state = _load_adapter(model, directory) if has_adapters(model) else _load_full(directory)
    except UNREADABLE as error:
        raise UserError(f"{directory}: the weights cannot be loaded ({why_unreadable(error)}).") from error
    live = model.state_dict()
    expected = trained_names(model)
    differing = sorted(state.keys() ^ expected)
    differing += [name for name in state.keys() & expected if state[name].shape != live[name].shape]
    if differing:
        raise UserError(
            f"{directory}: holds other weights than this run's model ({len(differing)} differ, first {differing[0]}). "
            "Check model.peft_type and model.lora."
        )
    return state


def _load_full(directory: Path) -> dict[str, Tensor]:
    if not (directory / "config.json").is_file():
        raise not_whole(directory)
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # else they would be drawn at random
        raise UserError(f"{directory}: lacks {len(missing)} weights of the model, first {missing[0]}.")
    return model.state_dict()


def not_whole(directory: Path) -> UserError:
    return UserError(f"{directory}: holds no full model. Was it saved with model.peft_type: lora?")


def _load_adapter(model: PeftModel, directory: Path) -> dict[str, Tensor]:
    if not (directory / "adapter_config.json").is_file():
        raise UserError(f"{directory}: holds no adapter. Was it saved without model.peft_type: lora?")
    saved = _live_tensors(model, directory)
    return split_initial(saved)[0] if changes_base(model.peft_config["default"]) else saved


def load_initial(model: nn.Module, directory: Path) -> dict[str, Tensor]:
    """What the adapters of a checkpoint began with, by the live model's names; none where they left the base alone.

    Raises:
        UserError: no such checkpoint, found by :func:`load_state` too.
    """
    if not has_adapters(model) or not changes_base(model.peft_config["default"]):
        return {}
    return split_initial(_live_tensors(model, directory))[1]


def _live_tensors(model: PeftModel, directory: Path) -> dict[str, Tensor]:
    live = {_adapter_place(name): name for name in trained_names(model)}
    return {live.get(name, name): tensor for name, tensor in _adapter_tensors(directory).items()}


def _adapter_tensors(directory: Path) -> dict[str, Tensor]:
    files = open_adapter(directory)
    return {name: files.read(name) for name in files.names()}


def describe(model: nn.Module, causal_lm: PreTrainedModel, base: Mapping[str, Tensor]) -> dict[str, Any]:
    """What weights alone do not say of a model, by name: its configuration, its adapters, its frozen base."""
    settings = causal_lm.config.to_dict()
    for key in ("_name_or_path", "dtype", "transformers_version", "use_cache", "eos_token_id", "pad_token_id"):
        settings.pop(key, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
    adapter = frozen = None
    if has_adapters(model):
        frozen = base_digest(base)
        adapter = describe_adapter(model.peft_config["default"])
    return {"model configuration (digest)": digest, "model.lora": adapter, "frozen base (digest)": frozen}


def adapter_dtype(directory: Path) -> str:
    """The dtype a saved adapter was trained in, like ``float32``.

    Raises:
        UserError: its weights cannot be read.
    """
    try:
        files = open_adapter(directory)
        return str(files.read(files.names()[0]).dtype).removeprefix("torch.")
    except UNREADABLE as error:
        raise UserError(f"{directory}: its adapter cannot be read ({why_unreadable(error)}).") from error
