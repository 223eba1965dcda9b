"""What a training step costs: FLOPs, bytes of collectives, memory per device.

Pure arithmetic over shapes; nothing here measures or runs anything. ``benchmarks/scaling.py`` compares it with counted
collectives and measured steps on CPU processes, ``benchmarks/gpu_estimate.py`` makes estimates for GPUs of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces at once (torch's bucket_cap_mb)


@dataclass(frozen=True)
class Shape:
    """A GPT-NeoX, as its config.json has it."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int

    def layer_tensors(self, tensor: int = 1) -> list[tuple[int, int]]:
        """Rows and columns of what one of ``tensor`` devices that share a layer has of it."""
        hidden, into, wide = self.hidden, 3 * self.hidden // tensor, self.intermediate // tensor
        norms = [(hidden, 1)] * 4
        attention = [(into, hidden), (into, 1), (hidden, hidden // tensor), (hidden, 1)]
        return [*norms, *attention, (wide, hidden), (wide, 1), (hidden, wide), (hidden, 1)]

    def root_tensors(self, tensor: int = 1) -> list[tuple[int, int]]:
        """Embeddings, last norm and head, which belong to no layer; of the head what one of ``tensor`` devices has."""
        hidden, rows = self.hidden, self.vocabulary // tensor
        return [(self.vocabulary, hidden), (hidden, 1), (hidden, 1), (rows, hidden)]

    def parameters(self, tensor: int = 1) -> int:
        return self.layers * elements(self.layer_tensors(tensor)) + elements(self.root_tensors(tensor))


MODELS = {
    "Pythia-1.4b": Shape(hidden=2048, layers=24, intermediate=8192, vocabulary=50304),
    "Pythia-6.9b": Shape(hidden=4096, layers=32, intermediate=16384, vocabulary=50432),
    "Pythia-12b": Shape(hidden=5120, layers=36, intermediate=20480, vocabulary=50688),
    "GPT-NeoX-20B": Shape(hidden=6144, layers=44, intermediate=24576, vocabulary=50432),
}


def elements(tensors: list[tuple[int, int]], shards: int = 1) -> int:
    """Of tensors whose rows are dealt to so many shards, all of them as long as the longest (FSDP2 pads them)."""
    return sum(math.ceil(rows / shards) * shards * columns for rows, columns in tensors)


@dataclass(frozen=True)
class Micro:
    """A micro-batch of one data-parallel rank.

    Attributes:
        tokens: of all conversations.
        supervised: those that the head sees.
        squares: the sum of the conversations' squared lengths, which attention costs.
    """

    tokens: int
    supervised: int
    squares: int


@dataclass(frozen=True)
class Precision:
    """Bytes of an element: of weights as held, of weights as computed with, of reduced gradients, of activations."""

    held: int
    computed: int
    reduced: int
    activation: int


FLOAT32 = Precision(held=4, computed=4, reduced=4, activation=4)
BF16_MIXED = Precision(held=4, computed=2, reduced=4, activation=2)


@dataclass(frozen=True)
class Layout:
    """``devices`` under ``strategy``, of which ``tensor`` neighbours share each layer's matrices."""

    strategy: str
    devices: int
    tensor: int = 1
    checkpointing: bool = False

    @property
    def data(self) -> int:
        """Groups that see different conversations."""
        return self.devices // self.tensor


@dataclass(frozen=True)
class Collective:
    """``times`` messages of ``size`` bytes, whole, among ``group`` devices."""

    kind: str
    size: int
    group: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a ring: an all-reduce is a reduce-scatter and an all-gather."""
        return self.times * self.size * (self.group - 1) / self.group * (2 if self.kind == "all_reduce" else 1)


def layer_flops(shape: Shape, micro: Micro) -> float:
    """Forward through one layer: two per weight of a matrix and token, and causal attention, half of the square."""
    matrices = 4 * shape.hidden**2 + 2 * shape.hidden * shape.intermediate
    return 2.0 * matrices * micro.tokens + 2.0 * shape.hidden * micro.squares


def unneeded_flops(shape: Shape, micro: Micro) -> float:
    """Of the last layer's MLP in the forward, which tokens that predict nothing do not go through."""
    return 4.0 * shape.hidden * shape.intermediate * (micro.tokens - micro.supervised)


def head_flops(shape: Shape, micro: Micro) -> float:
    """Forward and both gradients of the head, at supervised tokens only; its logits are computed once."""
    return 6.0 * shape.hidden * shape.vocabulary * micro.supervised


def step_flops(shape: Shape, layout: Layout, micros: list[Micro]) -> float:
    """Of one device: layers forward, twice that backward, once more where activations are computed again."""
    passes = 4 if layout.checkpointing else 3
    layers = sum(passes * (shape.layers * layer_flops(shape, micro) - unneeded_flops(shape, micro)) for micro in micros)
    return (layers + sum(head_flops(shape, micro) for micro in micros)) / layout.tensor


def collectives(shape: Shape, layout: Layout, micros: list[Micro], precision: Precision) -> list[Collective]:
    """What one device takes part in during one step, bookkeeping of a few numbers left out.

    DDP reduces the whole gradient once a step. FSDP2 gathers a layer for its forward and again for its backward, in
    every micro-batch, what belongs to no layer once in each, and reduces gradients once a step. Tensor parallelism adds
    up the products of attention and MLP in the forward, and the gradients of their inputs in the backward, those of the
    last MLP for supervised tokens alone; for the loss it gathers a few numbers of each of these, and adds up the
    gradients of the head's inputs.
    """
    found = []
    if layout.strategy == "ddp" and layout.data > 1:
        found.append(Collective("all_reduce", shape.parameters() * precision.reduced, layout.data, 1))
    if layout.strategy == "fsdp" and layout.data > 1:
        layer = elements(shape.layer_tensors(layout.tensor), layout.data)
        root = elements(shape.root_tensors(layout.tensor), layout.data)
        for unit, count, gathers in ((layer, shape.layers, 2), (root, 1, 1)):
            found.append(
                Collective("all_gather", unit * precision.computed, layout.data, gathers * count * len(micros))
            )
            found.append(Collective("reduce_scatter", unit * precision.reduced, layout.data, count))
    if layout.tensor > 1:
        of_last = 2  # of its MLP, forward and backward
        times = shape.layers * (forward_sums(layout) + 2) - of_last
        for micro in micros:
            token = shape.hidden * precision.activation
            found.append(Collective("all_reduce", micro.tokens * token, layout.tensor, times))
            found.append(Collective("all_reduce", micro.supervised * token, layout.tensor, of_last))
            found += head_collectives(shape, layout, micro, precision)
    return found


def head_collectives(shape: Shape, layout: Layout, micro: Micro, precision: Precision) -> list[Collective]:
    """Of the devices that share a head's vocabulary, in a micro-batch whose logits are one chunk."""
    gradients = micro.supervised * shape.hidden * precision.activation
    numbers = layout.tensor * micro.supervised * NUMBERS * 4  # in float32
    return [Collective("all_reduce", gradients, layout.tensor, 1), Collective("all_gather", numbers, layout.tensor, 1)]


NUMBERS = 5  # that devices tell each other of a supervised token


def forward_sums(layout: Layout) -> int:
    """Sums over a tensor-parallel group per layer that are not the backward's own."""
    return 2 + layout.checkpointing * RECOMPUTED_SUMS


RECOMPUTED_SUMS = 1  # where a layer is computed again: torch stops before the second, whose result nothing needs


def memory(shape: Shape, layout: Layout, micros: list[Micro], precision: Precision, logits: float) -> dict[str, float]:
    """Bytes of a device at the highest, by part, with AdamW's two moments in float32.

    A layer keeps 34 bytes per token and hidden unit at two bytes an element, of which 24 are shared out by tensor
    parallelism (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, without scores, which a fused attention does
    not keep). Recomputation keeps a layer's input, and one whole layer.

    Args:
        logits: bytes of a chunk's logits, of which the loss needs about two at once.
    """
    mine = shape.parameters(layout.tensor)
    shards = layout.data if layout.strategy == "fsdp" else 1
    layer, root = elements(shape.layer_tensors(layout.tensor)), elements(shape.root_tensors(layout.tensor))
    gathered = 0.0
    if layout.strategy == "fsdp" and layout.data > 1:
        gathered += (2 * layer + root) * precision.computed  # a layer, the next one on its way, and the root
        gathered += max(layer, root) * (precision.computed + precision.reduced)  # a gradient, before it is shared out
        if len(micros) > 1:
            gathered += mine * precision.reduced  # gradients add up unsharded
    elif precision.computed != precision.held:
        gathered += mine * precision.computed  # autocast keeps what it cast until the forward ends
    tokens = max(micro.tokens for micro in micros) * shape.hidden * precision.activation / 2
    whole = tokens * (10 + 24 / layout.tensor)
    kept = tokens * 2 * shape.layers + whole if layout.checkpointing else whole * shape.layers
    return {
        "weights": mine / shards * precision.held,
        "gradients": mine / shards * precision.reduced,
        "optimizer": mine / shards * 8,
        "gathered": gathered,
        "activations": kept,
        "logits": 2 * logits,
    }
