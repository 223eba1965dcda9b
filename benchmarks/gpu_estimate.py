"""From what a step costs to how long it might take on GPUs: an estimate, of which nothing was run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from benchmarks.cost_model import (
    BF16_MIXED,
    BUCKET,
    Collective,
    Layout,
    Micro,
    Shape,
    elements,
    forward_sums,
    head_collectives,
    head_flops,
    layer_flops,
    memory,
    step_flops,
)


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
    useful: float  # FLOPs of a device; what is computed again counts once
    memory: dict[str, float]

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


def estimate(shape: Shape, layout: Layout, micro: Micro, hardware: Hardware, logits: float = 512 * 2**20) -> Estimate:
    """A step of one micro-batch per device or group, under bf16-mixed.

    What tensor parallelism adds up or gathers is waited for. A layer's gather goes on beside the computing of the layer
    before, its reduction beside that of the next; what belongs to no layer is waited for at both ends. DDP's reductions
    go on beside the backward, the last bucket's after it.
    """
    speed = hardware.peak * hardware.ceiling
    layer = layer_flops(shape, micro) / layout.tensor / speed
    head = head_flops(shape, micro) / layout.tensor / speed
    sharing_head = sum(hardware.seconds(one) for one in head_collectives(shape, layout, micro, BF16_MIXED))
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
        root = elements(shape.root_tensors(layout.tensor), layout.data)
        gather, scatter = of("all_gather", unit * BF16_MIXED.computed), of("reduce_scatter", unit * BF16_MIXED.reduced)
        before = of("all_gather", root * BF16_MIXED.computed) + gather
        forwards = before + (shape.layers - 1) * max(forward, gather) + forward
        backwards = gather + shape.layers * max(backward, gather + scatter)
        after = scatter + of("reduce_scatter", root * BF16_MIXED.reduced)
        seconds = forwards + head + sharing_head + backwards + after + update
    useful = step_flops(shape, replace(layout, checkpointing=False), [micro])
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
