"""Layers of a network compiled for training by ``torch.compile``.

What a layer does is compiled, and not how it is called: gathering of sharded weights and activation checkpointing are
hooks and calls around a forward, and stay as they are. Attention over packed rows is left out
(``attention.by_conversation``): its Python goes by the conversations' lengths, which are others in every step.
"""

from __future__ import annotations

import inspect
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from transformers.modeling_layers import GradientCheckpointingLayer

from mft_lightning.errors import UserError
from mft_lightning.model.parallel import transformer_layers
from mft_lightning.model.supervised_loss import SupervisedLM


class CompiledForward:
    """A layer's forward, compiled where the layer trains and as it is where it does not.

    Validation and answers come with other shapes, caches and no gradients, each of which would be compiled anew.

    Args:
        layer: whose forward this is to take the place of.
    """

    def __init__(self, layer: GradientCheckpointingLayer) -> None:
        self.layer: Any = layer
        self.plain = layer.forward
        own = inspect.unwrap(type(layer).forward)  # of what computes activations again, which is done below
        self.compiled = torch.compile(MethodType(own, layer), dynamic=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.layer.training:
            return self.plain(*args, **kwargs)
        if self.layer.gradient_checkpointing:
            return self.layer._gradient_checkpointing_func(partial(self.compiled, **kwargs), *args)
        return self.compiled(*args, **kwargs)


def compile_layers(network: SupervisedLM) -> None:
    """Let the layers of a network train compiled; nothing is compiled before the first step.

    Raises:
        UserError: a model whose layers are not known.
    """
    for layer in transformer_layers(network):
        if not isinstance(layer, GradientCheckpointingLayer):
            kind = network.causal_lm.config.model_type
            raise UserError(f"model.compile_layers: the layers of a {kind} are not known. Leave it out.")
        layer.forward = CompiledForward(layer)


def require_compiler(device: torch.device) -> None:
    """Compile one addition.

    Args:
        device: for which it is compiled.

    Raises:
        UserError: what ``torch.compile`` needs is not there: a C++ compiler, or Triton for a GPU.
    """
    try:
        torch.compile(lambda number: number + 1)(torch.zeros(1, device=device))
    except TorchDynamoException as error:
        said = str(error).splitlines()[0]
        raise UserError(
            f"model.compile_layers: torch.compile does not work here ({said}). It needs a C++ compiler that CXX names "
            "or that is called g++. Install one, or leave the key out."
        ) from error
