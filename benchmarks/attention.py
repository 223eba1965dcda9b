"""Causal attention of one conversation: torch's fused one beside the one in blocks of queries, forward and backward.

    python benchmarks/attention.py
    python benchmarks/attention.py --lengths 215 --queries 64 128 256 512
    OMP_NUM_THREADS=1 python benchmarks/attention.py --heads 12

In bfloat16 on this CPU, on heads that lie as a GPT-NeoX layer gives them. For each length, the least milliseconds of
``--repeats`` rounds, in each of which every way has its turn, their ratio to the fused one's, and the largest relative
error of the output and of the three gradients against float64.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mft_lightning.model import blocked_attention

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]


def blocked(queries: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    blocked_attention.QUERIES = queries
    return blocked_attention.blocked_causal_attention(query, key, value, query.shape[1:2], query.shape[-1] ** -0.5)


def gradients(way: Way, inputs: list[Tensor], towards: Tensor) -> tuple[list[Tensor], float, float]:
    """The output and its gradients, and the seconds of forward and backward."""
    start = time.perf_counter()
    output = way(*inputs)
    between = time.perf_counter()
    found = torch.autograd.grad(output, inputs, towards)
    return [output.detach(), *found], between - start, time.perf_counter() - between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 215, 400, 800, 1600])
    parser.add_argument("--queries", type=int, nargs="+", default=[128, 256, 512], help="of a block")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head", type=int, default=64, help="elements of one")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    ways: dict[str, Way] = {"fused": fused} | {f"blocks {n}": partial(blocked, n) for n in options.queries}
    print(f"{options.heads} heads of {options.head}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'length':>6} {'way':12} {'forward':>8} {'backward':>8} {'ratio':>6}  error")
    for length in options.lengths:
        all_heads = torch.randn(length, options.heads, 3 * options.head).bfloat16().transpose(0, 1)
        inputs = [part.detach().requires_grad_() for part in all_heads.chunk(3, dim=-1)]
        towards = torch.randn(options.heads, length, options.head).bfloat16()
        exact, *_ = gradients(fused, [part.detach().double().requires_grad_() for part in inputs], towards.double())
        rounds = [[gradients(way, inputs, towards) for way in ways.values()] for _ in range(options.repeats)]
        first = None
        for name, found in zip(ways, zip(*rounds, strict=True), strict=True):
            forward, backward = (1e3 * min(one[i] for one in found) for i in (1, 2))
            pairs = zip(found[0][0], exact, strict=True)
            error = max(float((ours.double() - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
            first = first or forward + backward
            ratio = (forward + backward) / first
            print(f"{length:6} {name:12} {forward:8.2f} {backward:8.2f} {ratio:6.2f}  {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
