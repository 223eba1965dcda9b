"""A process that measures how fast the device multiplies matrices, once each time it is told to.

python -m benchmarks.throughput.gemm DEVICE DTYPE
"""

from __future__ import annotations

import sys
import time

import torch

from benchmarks.throughput.pausing import tell

SIZE = {"cpu": 2048, "cuda": 8192}


def gemm_speed(device: torch.device, dtype: torch.dtype) -> float:
    size = SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    taken = []
    for _ in range(5):
        begun = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return 2 * size**3 / sorted(taken)[len(taken) // 2]


def main(device: str, dtype: str) -> None:
    while True:
        tell(speed=gemm_speed(torch.device(device), getattr(torch, dtype)))


if __name__ == "__main__":
    main(*sys.argv[1:])
