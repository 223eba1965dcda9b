"""Matrices shared out over several devices: which are cut by columns, and which by rows.

GPT-NeoX has its queries, keys and values in one matrix, interleaved head by head, so that a block of its columns is
whole heads: attention goes on with the heads that are there. The matrix after each such block is cut by rows, and its
products are added up over the devices; between the two nothing is communicated. The head is cut by rows of the
vocabulary, for a loss that knows it (``vocabulary_parallel.py``). Everything else (norms, input embeddings) is on every
device of a group, sees the same values there and has the same gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import PretrainedConfig, PreTrainedModel

from mft_lightning.errors import UserError

KEY = "parallel.tensor_parallel_size"


class WaitedRows(RowwiseParallel):
    """Cut by rows, its sum over the devices waited for at once: for layers that are computed again.

    Elsewhere attention's sum goes on beside the MLP that does not read it. But a sum that nobody ever reads is kept by
    torch until the process ends, and so is attention's of a layer that is computed again, which stops before.
    """

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: DTensor, device_mesh: DeviceMesh
    ) -> Any:
        outputs = outputs.redistribute(placements=output_layouts)
        return outputs.to_local() if use_local_output else outputs


PLANS: dict[str, dict[str, type[ColwiseParallel] | type[RowwiseParallel]]] = {
    "gpt_neox": {
        "attention.query_key_value": ColwiseParallel,
        "attention.dense": RowwiseParallel,
        "mlp.dense_h_to_4h": ColwiseParallel,
        "mlp.dense_4h_to_h": RowwiseParallel,
    }
}


def check_tensor_parallel(config: PretrainedConfig, size: int, whole: Sequence[str] = ()) -> None:
    """Raise where a model cannot be shared out so.

    Args:
        config: of the model.
        size: devices that share each layer.
        whole: names of modules that train whole beside adapters.

    Raises:
        UserError: a type whose plan is not known, heads or columns that the devices do not divide, or a module that
            would be cut and is to train whole.
    """
    if size == 1:
        return
    if config.model_type not in PLANS:
        raise UserError(f"{KEY}: how to cut a {config.model_type} is not known. Use 1, and trainer.strategy: fsdp.")
    for name in ("num_attention_heads", "intermediate_size"):
        if (value := getattr(config, name)) % size:
            raise UserError(f"{KEY}: {size} does not divide the model's {name} ({value}).")
    if cut := [name for name in whole for path in PLANS[config.model_type] if path.endswith(name)]:
        raise UserError(f"model.lora.modules_to_save: {cut[0]} is cut by {KEY}. Leave it out, or use 1.")


def can_split(config: PretrainedConfig, size: int) -> bool:
    """Whether a model can be shared out so."""
    try:
        check_tensor_parallel(config, size)
    except UserError:
        return False
    return True


def split_layer(layer: nn.Module, model_type: str, mesh: DeviceMesh) -> None:
    """Leave this device its part of a layer's matrices, in place; every device has the whole layer before.

    An adapter beside a matrix that is cut by columns has its second factor cut so, one beside rows its first.

    Args:
        layer: a transformer layer, with adapters or without.
        model_type: of the model.
        mesh: one dimension, the devices that share the layer.
    """
    rows = WaitedRows if getattr(layer, "gradient_checkpointing", False) else RowwiseParallel
    plan: dict[str, Any] = {}
    for name, style in PLANS[model_type].items():
        columns = style is ColwiseParallel
        cut = ColwiseParallel if columns else rows
        if hasattr(layer.get_submodule(name), "lora_A"):
            factor = "lora_B" if columns else "lora_A"
            plan |= {f"{name}.base_layer": cut(), f"{name}.{factor}.default": cut()}
        else:
            plan[name] = cut()
    parallelize_module(layer, mesh, plan, src_data_rank=None)


def is_head_cut(model: PreTrainedModel, size: int) -> bool:
    """Whether so many devices share a model's head: a matrix of its own, of rows that they divide, without adapters."""
    head: Any = model.get_output_embeddings()
    tied = head.weight is cast(Any, model.get_input_embeddings()).weight
    return type(head) is nn.Linear and not tied and head.out_features % size == 0


def split_head(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Leave this device its rows of the head, in place, where it can be cut; every device has the whole head before.

    A call of the head still gives all logits, gathered.
    """
    if is_head_cut(model, mesh.size()):
        style = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(cast(nn.Module, model.get_output_embeddings()), mesh, style, src_data_rank=None)


def narrow_layer(layer: nn.Module, model_type: str, size: int) -> None:
    """Leave of a sketched layer, in place, the shapes of what :func:`split_layer` leaves one device.

    Args:
        layer: a transformer layer on the meta device, with adapters or without.
        model_type: of the model.
        size: devices that share the layer.
    """
    for name, style in PLANS[model_type].items():
        linear: Any = layer.get_submodule(name)
        columns = style is ColwiseParallel
        _narrow(linear, columns, size)
        if hasattr(linear, "lora_A"):
            _narrow(linear.base_layer, columns, size)
            _narrow((linear.lora_B if columns else linear.lora_A)["default"], columns, size)


def narrow_head(model: PreTrainedModel, size: int) -> None:
    """Leave of a sketched model's head, in place, what :func:`split_head` leaves one device."""
    if is_head_cut(model, size):
        _narrow(model.get_output_embeddings(), True, size)


def _narrow(linear: Any, columns: bool, size: int) -> None:
    """Cut a layer's weight, and by columns its bias too; an adapter's wrapper has widths alone."""
    width = "out_features" if columns else "in_features"
    setattr(linear, width, getattr(linear, width) // size)
    for name, whole in list(linear.named_parameters(recurse=False)):
        if columns or name == "weight":
            part = whole.detach().chunk(size, 0 if columns else 1)[0]
            setattr(linear, name, nn.Parameter(part, requires_grad=whole.requires_grad))
