"""A network split over two ranks beside one narrowed on the meta device; test_tensor_parallel.py runs this."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import GPTNeoXConfig

from mft_lightning import ranks
from mft_lightning.model.lora import add_lora
from mft_lightning.model.parallel import transformer_layers
from mft_lightning.model.settings import LoraSettings
from mft_lightning.model.supervised_loss import SupervisedLM
from mft_lightning.model.tensor_parallel import narrow_head, narrow_layer, split_head, split_layer
from mft_lightning.model.weights import sketch

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 1}
ADAPTERS = [
    None,
    LoraSettings(r=2),
    LoraSettings(r=2, target_modules=["query_key_value", "dense_4h_to_h", "lm_head"]),
]


def network(adapters: LoraSettings | None) -> SupervisedLM:
    model = sketch(GPTNeoXConfig(**SIZES), torch.float32)
    return SupervisedLM(model if adapters is None else add_lora(model, adapters, base_path="base"))


def shapes(found: SupervisedLM) -> dict[str, tuple[torch.Size, bool]]:
    """Of what this device holds of each parameter, and whether it is trained."""
    named = found.named_parameters()
    local = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in named}
    return {name: (value.shape, value.requires_grad) for name, value in local.items()}


def main() -> None:
    ranks.join()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor_parallel",))
    for adapters in ADAPTERS:
        split, narrowed = network(adapters).to_empty(device="cpu"), network(adapters)
        for layer in transformer_layers(split):
            split_layer(layer, "gpt_neox", mesh)
        split_head(split.causal_lm, mesh)
        for layer in transformer_layers(narrowed):
            narrow_layer(layer, "gpt_neox", 2)
        narrow_head(narrowed.causal_lm, 2)
        assert shapes(narrowed) == shapes(split)
        for name, module in narrowed.named_modules():
            if isinstance(module, nn.Linear):
                assert module.weight.shape == (module.out_features, module.in_features), name
    if dist.get_rank() == 0:
        print("the same shapes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
