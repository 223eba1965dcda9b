"""What a training step costs: FLOPs, bytes of collectives, memory per device, and from these an estimate of its time.

Pure arithmetic over shapes; nothing here measures or runs anything. ``benchmarks/scaling.py`` compares it with counted
collectives and measured steps on CPU processes, and prints its estimates for GPUs.
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

    def root_tensors(self) -> list[tuple[int, int]]:
        """Embeddings, last norm and head, which belong to no layer."""
        return [(self.vocabulary, self.hidden), (self.hidden, 1), (self.hidden, 1), (self.vocabulary, self.hidden)]

    def parameters(self, tensor: int = 1) -> int:
        return self.layers * elements(self.layer_tensors(tensor)) + elements(self.root_tensors())


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


def head_flops(shape: Shape, micro: Micro) -> float:
    """Forward and both gradients of the head, at supervised tokens only; its logits are computed once."""
    return 6.0 * shape.hidden * shape.vocabulary * micro.supervised


def step_flops(shape: Shape, layout: Layout, micros: list[Micro]) -> float:
    """Of one device: layers forward, twice that backward, once more where activations are computed again."""
    passes = 4 if layout.checkpointing else 3
    layers = sum(passes * shape.layers * layer_flops(shape, micro) for micro in micros) / layout.tensor
    return layers + sum(head_flops(shape, micro) for micro in micros)


def collectives(shape: Shape, layout: Layout, micros: list[Micro], precision: Precision) -> list[Collective]:
    """What one device takes part in during one step, bookkeeping of a few numbers left out.

    DDP reduces the whole gradient once a step. FSDP2 gathers a layer for its forward and again for its backward, in
    every micro-batch, what belongs to no layer once in each, and reduces gradients once a step. Tensor parallelism adds
    up the products of attention and MLP in the forward, and the gradients of their inputs in the backward.
    """
    found = []
    if layout.strategy == "ddp" and layout.data > 1:
        found.append(Collective("all_reduce", shape.parameters() * precision.reduced, layout.data, 1))
    if layout.strategy == "fsdp" and layout.data > 1:
        layer = elements(shape.layer_tensors(layout.tensor), layout.data)
        root = elements(shape.root_tensors(), layout.data)
        for unit, count, gathers in ((layer, shape.layers, 2), (root, 1, 1)):
            found.append(
                Collective("all_gather", unit * precision.computed, layout.data, gathers * count * len(micros))
            )
            found.append(Collective("reduce_scatter", unit * precision.reduced, layout.data, count))
    if layout.tensor > 1:
        times = shape.layers * (forward_sums(layout) + 2)
        found += [
            Collective("all_reduce", micro.tokens * shape.hidden * precision.activation, layout.tensor, times)
            for micro in micros
        ]
    return found


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
    layer, root = elements(shape.layer_tensors(layout.tensor)), elements(shape.root_tensors())
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


@dataclass(frozen=True)
class Hardware:
    """Of one GPU in a cluster; bytes and FLOPs per second, seconds.

    Attributes:
        peak: dense bfloat16. https://www.nvidia.com/en-us/data-center/h100/ (SXM)
        ceiling: share of the peak that computing alone reaches. Assumed: published runs reach 38 % to 43 % with
            communication (Llama 3, https://arxiv.org/abs/2407.21783, table 4).
        memory: bytes. Same page as the peak.
        usable: share of it. Assumed; the rest is the context, NCCL's buffers and fragmentation.
        memory_speed: same page.
        link: NVLink in one direction, half of the 900 GB/s on the same page.
        network: 400 Gb/s InfiniBand per GPU, as in https://www.nvidia.com/en-us/data-center/dgx-h100/.
        reached: share of both that a collective reaches. Assumed.
        node: GPUs that NVLink joins.
        ring_hop, tree_hop, network_hop: latencies of NCCL's own cost model, Simple protocol, hwLat in
            https://github.com/NVIDIA/nccl (src/graph/tuning.cc).
    """

    peak: float = 989e12
    ceiling: float = 0.5
    memory: float = 80e9
    usable: float = 0.9
    memory_speed: float = 3.35e12
    link: float = 450e9
    network: float = 50e9
    reached: float = 0.8
    node: int = 8
    ring_hop: float = 3.4e-6
    tree_hop: float = 4.0e-6
    network_hop: float = 14e-6

    def seconds(self, one: Collective, apart: int = 1) -> float:
        """Of collectives among devices of which every ``apart``-th of a node takes part, as rings or, where that is
        faster, a tree. A ring over nodes has as many network ports of a node as it has GPUs in it."""
        if one.group == 1:
            return 0.0
        local = min(one.group, self.node // apart)
        nodes = math.ceil(one.group / local)
        speed = self.reached * (self.link if nodes == 1 else min(self.link, self.network * local))
        twice = 2 if one.kind == "all_reduce" else 1
        hops = twice * ((one.group - nodes) * self.ring_hop + (nodes - 1) * self.network_hop)
        if one.kind == "all_reduce":
            hops = min(hops, 2 * ((local - 1) * self.tree_hop + math.log2(nodes) * self.network_hop))
        return one.times * hops + one.sent / speed


@dataclass(frozen=True)
class Estimate:
    """Of one step, on every device alike."""

    layout: Layout
    seconds: float
    communicating: float  # of these, seconds in which nothing else goes on
    useful: float  # FLOPs of a device; what is computed again, or on every device of a group, counts once
    memory: dict[str, float]

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


def estimate(shape: Shape, layout: Layout, micro: Micro, hardware: Hardware, logits: float = 512 * 2**20) -> Estimate:
    """A step of one micro-batch per device or group, under bf16-mixed.

    Sums of tensor parallelism are waited for. A layer's gather goes on beside the computing of the layer before, its
    reduction beside that of the next; what belongs to no layer is waited for at both ends. DDP's reductions go on
    beside the backward, the last bucket's after it.
    """
    speed = hardware.peak * hardware.ceiling
    layer = layer_flops(shape, micro) / layout.tensor / speed
    head = head_flops(shape, micro) / speed
    message = micro.tokens * shape.hidden * BF16_MIXED.activation
    one_sum = hardware.seconds(Collective("all_reduce", message, layout.tensor, 1))
    forward = layer + 2 * one_sum
    backward = layer * (3 if layout.checkpointing else 2) + forward_sums(layout) * one_sum
    shards = layout.data if layout.strategy == "fsdp" else 1
    update = shape.parameters(layout.tensor) / shards * 28 / hardware.memory_speed  # seven float32 read or written
    computing = shape.layers * layer * (4 if layout.checkpointing else 3) + head + update

    def of(kind: str, size: int) -> float:
        return hardware.seconds(Collective(kind, size, layout.data, 1), layout.tensor)

    if layout.strategy == "ddp":
        size = shape.parameters() * BF16_MIXED.reduced
        reduction = math.ceil(size / BUCKET) * of("all_reduce", BUCKET)
        behind = max(of("all_reduce", BUCKET), reduction - shape.layers * backward)
        seconds = computing + behind
    else:
        unit = elements(shape.layer_tensors(layout.tensor), layout.data)
        root = elements(shape.root_tensors(), layout.data)
        gather, scatter = of("all_gather", unit * BF16_MIXED.computed), of("reduce_scatter", unit * BF16_MIXED.reduced)
        before = of("all_gather", root * BF16_MIXED.computed) + gather
        forwards = before + (shape.layers - 1) * max(forward, gather) + forward
        backwards = gather + shape.layers * max(backward, gather + scatter)
        after = scatter + of("reduce_scatter", root * BF16_MIXED.reduced)
        seconds = forwards + head + backwards + after + update
    useful = step_flops(shape, Layout(layout.strategy, layout.devices), [micro]) / layout.tensor
    return Estimate(layout, seconds, seconds - computing, useful, memory(shape, layout, [micro], BF16_MIXED, logits))


def best(shape: Shape, devices: int, micro: Micro, hardware: Hardware) -> Estimate | None:
    """The fastest layout that fits, for ``micro`` on every device; a group takes that of all its devices together."""
    found = []
    for strategy, tensor in (("ddp", 1), ("fsdp", 1), ("fsdp", 2), ("fsdp", 4), ("fsdp", 8)):
        if devices % tensor:
            continue
        for checkpointing in (False, True):
            group = Micro(micro.tokens * tensor, micro.supervised * tensor, micro.squares * tensor)
            found.append(estimate(shape, Layout(strategy, devices, tensor, checkpointing), group, hardware))
    fitting = [one for one in found if one.bytes <= hardware.memory * hardware.usable]
    return min(fitting, key=lambda one: round(one.seconds, 3), default=None)  # of equals, the simpler one
