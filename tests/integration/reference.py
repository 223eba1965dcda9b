"""What the numbers of a step must be: a plain transformers model in float64, one conversation after the other.

Only the batches and the token ids are taken from the program. Adapters are merged into the weights, and their gradients
follow by the chain rule from those of the merged weights, so that peft has no part in it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mft_lightning.data.token_table import TokenTable
from mft_lightning.model.module import MFTModule
from mft_lightning.model.parallel import fill

R, ALPHA = 4, 8.0
ADAPTED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
PEFT = "base_model.model."  # before the names of a model that peft wraps


def adapter_weight(name: str, shape: torch.Size) -> Tensor:
    """The start of ``….query_key_value.lora_A`` or the like: drawn in float32 from the name alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) * 0.1


def plain_name(name: str) -> str:
    """The name that an adapter's weight is drawn from, whether it is a parameter's or one in a saved adapter."""
    return name.removeprefix(PEFT).removesuffix(".weight").removesuffix(".default")


class KnownAdapters(L.Callback):
    """Starts adapters away from where peft does: there every B is zero, and so is half of the gradient."""

    def on_train_start(self, trainer: L.Trainer, pl_module: MFTModule) -> None:
        assert pl_module.network is not None
        with torch.no_grad():
            for name, parameter in pl_module.network.model.named_parameters():
                if parameter.requires_grad:
                    fill(parameter, adapter_weight(plain_name(name), parameter.shape))


@dataclass(frozen=True)
class Measured:
    """What each conversation contributes to any loss.

    Attributes:
        tasks: number of its task.
        supervised: its supervised tokens.
        nll: summed over them, ``float64 [conversations]``.
        gradients: of that sum, by everything that trains, ``float64 [conversations, parameters]``.
    """

    tasks: list[int]
    supervised: list[int]
    nll: Tensor
    gradients: Tensor


def measure(directory: Path, table: TokenTable, kind: str) -> Measured:
    """Forward and backward of the model in ``directory`` for every conversation alone.

    Args:
        directory: float32 weights, as transformers saves them.
        table: the conversations.
        kind: ``full`` or ``lora``.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager").eval()
    adapters = _merge_adapters(model) if kind == "lora" else {}
    nll, gradients, supervised = [], [], []
    for number in range(len(table)):
        ids, mask = (torch.tensor(part.astype("int64")) for part in table.row(number))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        each = -logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        total = each[mask[1:] == 1].sum()
        model.zero_grad()
        total.backward()
        nll.append(total.detach())
        supervised.append(int(mask[1:].sum()))
        gradients.append(_adapter_gradient(model, adapters) if adapters else _gradient(model))
    return Measured(table.tasks.tolist(), supervised, torch.stack(nll), torch.stack(gradients))


def _gradient(model: PreTrainedModel) -> Tensor:
    parameters = list(model.parameters())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters)
    return torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])


def _merge_adapters(model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Add ``alpha / r * B A`` to the weights of the adapted layers; ``A`` and ``B`` by the layer's name."""
    adapters = {}
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] in ADAPTED:
            assert isinstance(layer, nn.Linear)
            a = adapter_weight(f"{name}.lora_A", torch.Size([R, layer.in_features])).double()
            b = adapter_weight(f"{name}.lora_B", torch.Size([layer.out_features, R])).double()
            adapters[name] = (a, b)
            with torch.no_grad():
                layer.weight += ALPHA / R * b @ a
    assert adapters
    return adapters


def _adapter_gradient(model: PreTrainedModel, adapters: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """By ``A`` it is ``alpha / r * B' dW``, by ``B`` it is ``alpha / r * dW A'``."""
    parts = []
    for name, (a, b) in adapters.items():
        by_weight = model.get_submodule(name).weight.grad
        assert isinstance(by_weight, Tensor)
        parts += [ALPHA / R * b.T @ by_weight, ALPHA / R * by_weight @ a.T]
    return torch.cat([part.flatten() for part in parts])


def factors(mode: str, tasks: list[int], supervised: list[int], weights: list[float]) -> Tensor:
    """What the NLL of each conversation of a global batch is multiplied by: the design's four formulas.

    Args:
        mode: case1 to case4.
        tasks: task number of each conversation of the batch.
        supervised: its supervised tokens.
        weights: of each task, of mean 1 over all tasks.
    """
    found = []
    for task, tokens in zip(tasks, supervised, strict=True):
        of_task = [n for other, n in zip(tasks, supervised, strict=True) if other == task]
        found.append(
            {
                "case1": 1 / sum(supervised),
                "case2": 1 / (len(tasks) * tokens),
                "case3": weights[task] / (len(set(tasks)) * sum(of_task)),
                "case4": weights[task] / (len(set(tasks)) * len(of_task) * tokens),
            }[mode]
        )
    return torch.tensor(found, dtype=torch.float64)


def step_numbers(
    measured: Measured, batch: list[int], mode: str, names: list[str], weights: list[float]
) -> dict[str, float]:
    """The metrics of a step on a global batch, by the names they are logged under; none of a task that is absent."""
    tasks, supervised = [measured.tasks[i] for i in batch], [measured.supervised[i] for i in batch]
    scales, nll = factors(mode, tasks, supervised, weights), measured.nll[batch]
    numbers = {"train/loss": float(scales @ nll), "train/grad_norm": float((scales @ measured.gradients[batch]).norm())}
    for number, name in enumerate(names):
        if number in tasks:
            of_task = torch.tensor([task == number for task in tasks])
            tokens = sum(n for n, task in zip(supervised, tasks, strict=True) if task == number)
            numbers[f"train/loss/{name}"] = float(nll[of_task].sum()) / tokens
    return numbers
