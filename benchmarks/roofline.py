"""What the parts of an optimizer step must compute and move at least, counted from shapes: the roofline's side."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mft_lightning.data.collate import StepBatch
from mft_lightning.model.flops import CAUSAL_SCORES, FORWARD, INPUT_GRADIENT, LINEAR, WEIGHT_GRADIENT
from mft_lightning.model.module import MFTModule
from mft_lightning.model.quantized import whole_numel

EMBEDDING, PROJECTIONS, ROTARY = "embedding", "attention's projections", "rotary embedding, heads' layout"
ATTENTION, MLP, NORMS, HEAD = "attention itself", "MLP", "norms and residuals", "head and loss"
CLIPPING, OPTIMIZER = "gradient's norm, clipping", "optimizer"
COPIED = 256 * 2**20  # bytes, far more than caches hold


@dataclass
class Work:
    """Of a part, forward and backward: floating-point operations of matrix products, and bytes to and from memory."""

    flops: int = 0
    moved: int = 0

    def seconds(self, gemm: float, copy: float) -> float:
        """The least time at ``gemm`` operations and ``copy`` bytes a second, each hidden behind the other."""
        return max(self.flops / gemm, self.moved / copy)


def copy_speed(device: torch.device, times: int = 7) -> float:
    """Bytes a second that a large copy reads and writes, at best, with the threads this process has."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * COPIED / min(seconds)


def work_of_step(module: MFTModule, batch: StepBatch, *, clipped: bool) -> dict[str, Work]:
    """What each part of a GPT-NeoX's step has to do, as if no part had to read twice what it reads.

    Matrix products are counted as for ``train/mfu``, but for what this program need not compute: the last layer's MLP
    where no prediction counts, and the gradient of the first layer's input where nothing below it trains. Bytes are
    those of weights, of a part's inputs and outputs and of what must be kept for its backward pass, and of gradients
    and moments. Logits, attention's scores and what adapters add are taken to stay in caches.

    Args:
        module: whose network is whole on this device.
        batch: all of the step.
        clipped: whether gradients are.
    """
    network: Any = module.network
    lm = network.causal_lm
    config, backbone = lm.config, lm.base_model
    hidden, layers = config.hidden_size, config.num_hidden_layers
    tokens, supervised = batch.tokens, batch.supervised
    stream, product = lm.dtype.itemsize, module.product_dtype.itemsize
    works = {part: Work() for part in (EMBEDDING, PROJECTIONS, ROTARY, ATTENTION, MLP, NORMS, HEAD)}

    table = backbone.embed_in.weight
    works[EMBEDDING].moved = 2 * tokens * hidden * stream
    if table.requires_grad:
        works[EMBEDDING].moved += tokens * hidden * stream + held(table)
    for number, layer in enumerate(backbone.layers):
        for part, block in ((PROJECTIONS, layer.attention), (MLP, layer.mlp)):
            rows = supervised if part == MLP and number == layers - 1 else tokens
            for name, linear in block.named_modules():
                if isinstance(linear, LINEAR):
                    first = number == 0 and name.split(".")[0] in ("query_key_value", "dense_h_to_4h")
                    onward = table.requires_grad or not first or "lora_B" in name
                    adapter = ".lora_" in name
                    add(works[part], linear, rows, product, onward=onward, in_cache=adapter)
    works[ATTENTION].flops = 3 * CAUSAL_SCORES * hidden * layers * batch.squared_lengths
    works[ATTENTION].moved = 12 * layers * tokens * hidden * product  # 3 in, 1 out; 5 in, 3 out
    turned = backbone.layers[0].attention.rotary_ndims / backbone.layers[0].attention.head_size
    works[ROTARY].moved = int(8 * layers * tokens * hidden * turned * product)  # queries and keys, in place
    works[NORMS].moved = 12 * layers * tokens * hidden * stream  # x in, both norms out, both branches in, x out; 5
    add(works[HEAD], lm.get_output_embeddings(), supervised, product, onward=True, in_cache=False)
    works[HEAD].moved -= 2 * supervised * config.vocab_size * product  # the logits

    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    works[CLIPPING] = Work(moved=sum(map(held, trained)) * (3 if clipped else 1))  # read; then read and written
    works[OPTIMIZER] = Work(moved=7 * sum(map(held, trained)))  # weights, moments, each in and out; gradients in
    return works


def add(work: Work, linear: Any, rows: int, product: int, *, onward: bool, in_cache: bool) -> None:
    """Add a linear layer's forward and backward.

    Args:
        work: to add to.
        linear: the layer.
        rows: that go through it.
        product: bytes of an element that is multiplied.
        onward: whether the gradient of its input is needed.
        in_cache: whether its inputs and outputs do not count as moved.
    """
    trains = linear.weight.requires_grad
    flops = FORWARD + INPUT_GRADIENT * onward + WEIGHT_GRADIENT * trains
    work.flops += whole_numel(linear.weight) * rows * flops
    work.moved += held(linear.weight) * (1 + onward + trains)
    if not in_cache:
        given, made = linear.in_features, linear.out_features
        work.moved += rows * product * (given * (1 + onward + trains) + made * (1 + (onward or trains)))


def held(parameter: nn.Parameter) -> int:
    """Bytes of a parameter as it is held."""
    return parameter.numel() * parameter.element_size()


def total(works: Iterable[dict[str, Work]]) -> dict[str, Work]:
    """The works of several steps, added up."""
    found: dict[str, Work] = {}
    for step in works:
        for part, work in step.items():
            sums = found.setdefault(part, Work())
            sums.flops += work.flops
            sums.moved += work.moved
    return found
