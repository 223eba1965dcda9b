"""Does it pay that the devices of a tensor-parallel group share the head's vocabulary? The head's loss in both forms.

    python benchmarks/shared_head.py [--ranks 2] [--hidden 512] [--vocabulary 50304] [--tokens 512 2048] [--repeats 7]

Forward and backward of the loss of so many supervised tokens, on processes that talk through gloo: each with the whole
head, as without sharing, or each with its part of it; in turns, one thread a process. Prints the median seconds of each
and their ratio, for a head that trains and for a frozen one, and how far losses and the hidden states' gradients are
apart. The gradient of a head that trains is reduced over other groups later, in both forms, in the second of its part.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import time
from typing import Any

import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from mft_lightning.meeting import HERE, host_store
from mft_lightning.model.head_loss import head_loss
from mft_lightning.model.objective import Objective
from mft_lightning.model.supervised_loss import LOGIT_BUDGETS


def once(head: nn.Module, columns: int, hidden: Tensor, targets: Tensor) -> tuple[float, Tensor, Tensor]:
    """Seconds, the loss, and the gradient of the hidden states."""
    head.zero_grad()
    inputs = hidden.clone().requires_grad_()
    dist.barrier()
    start = time.perf_counter()
    factors = torch.full((len(targets),), 1 / len(targets), dtype=torch.float64)
    losses = head_loss(head, inputs, targets, factors, Objective(), LOGIT_BUDGETS["cpu"] // (4 * columns))
    losses.loss.backward()
    seconds = time.perf_counter() - start
    assert inputs.grad is not None
    return seconds, losses.loss.detach(), inputs.grad


def rank_main(rank: int, options: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore(HERE, port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.ranks)
    measure(rank, options)
    gc.collect()  # what was shared holds gloo's threads, which must end before the process does
    dist.destroy_process_group()


def measure(rank: int, options: argparse.Namespace) -> None:
    mesh = init_device_mesh("cpu", (options.ranks,), mesh_dim_names=("tensor_parallel",))
    torch.manual_seed(0)
    whole = nn.Linear(options.hidden, options.vocabulary, bias=False)
    part: Any = copy.deepcopy(whole)
    parallelize_module(part, mesh, ColwiseParallel(), src_data_rank=None)
    if rank == 0:
        print("| head | tokens | whole s | shared s | shared / whole | loss off | gradient off |\n" + "|---" * 7 + "|")
    for trains in (True, False):
        for tokens in options.tokens:
            hidden, targets = torch.randn(tokens, options.hidden), torch.randint(options.vocabulary, (tokens,))
            times: dict[str, list[float]] = {"whole": [], "shared": []}
            found = {}
            for turn in range(options.repeats + 1):
                for name, head, share in (("whole", whole, 1), ("shared", part, options.ranks)):
                    head.requires_grad_(trains)
                    seconds, *found[name] = once(head, options.vocabulary // share, hidden, targets)
                    if turn:  # the first of each is not counted
                        times[name].append(seconds)
            if rank == 0:
                first, second = (statistics.median(times[name]) for name in ("whole", "shared"))
                off = [float((a - b).norm() / a.norm()) for a, b in zip(found["whole"], found["shared"], strict=True)]
                kind = "trains" if trains else "frozen"
                print(
                    f"| {kind} | {tokens:,} | {first:.3f} | {second:.3f} | {second / first:.2f} | {off[0]:.0e} | "
                    f"{off[1]:.0e} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    store = host_store(0)
    multiprocessing.spawn(rank_main, (options, store.port), options.ranks)


if __name__ == "__main__":
    main()
