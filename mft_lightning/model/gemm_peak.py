"""How fast a device multiplies matrices, measured on it: what a step's speed is compared with."""

from __future__ import annotations

import time

import torch

SIZES = (256, 512, 1024, 2048, 4096, 8192)  # rows and columns
LONG_ENOUGH = 0.005  # seconds of a product, of which larger ones are no faster
MEASURED = 0.03  # seconds for each size
LEAST = 2  # products of each


def gemm_speed(device: torch.device, dtype: torch.dtype, seconds: float = MEASURED) -> float:
    """Floating-point operations a second of products of square matrices, with the threads this process has.

    The best product counts, as a busy neighbour must not lower the peak of a whole run: a small one may pass between
    two turns of the neighbour's. Ranks that measure at the same time add up to their machine's peak as long as each has
    cores of its own, which is how they are started. Values are drawn (a GPU multiplies zeros faster), by a generator of
    their own.

    Args:
        device: to measure.
        dtype: of the matrices.
        seconds: how long to measure each size.
    """
    best = 0.0
    for size in SIZES:
        generator = torch.Generator(device).manual_seed(0)
        left, right = (
            torch.randn(size, size, generator=generator, device=device, dtype=torch.float32).to(dtype) for _ in "ab"
        )
        product = torch.mm(left, right)  # the first prepares what the others find
        taken: list[float] = []
        while sum(taken) < seconds or len(taken) < LEAST:
            taken.append(_seconds(left, right, product))
        best = max(best, 2 * size**3 / min(taken))
        if min(taken) >= LONG_ENOUGH:
            break
    return best


def _seconds(left: torch.Tensor, right: torch.Tensor, product: torch.Tensor) -> float:
    """What one product takes."""
    if left.is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        begin.record()
        torch.mm(left, right, out=product)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    begun = time.perf_counter()
    torch.mm(left, right, out=product)
    return time.perf_counter() - begun
