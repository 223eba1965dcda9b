"""A process that measures how fast the device multiplies matrices, once each time it is let go.

python -m benchmarks.throughput.gemm DEVICE DTYPE
"""

from __future__ import annotations

import sys

import torch

from benchmarks.throughput.pausing import tell
from mft_lightning.model.gemm_peak import gemm_speed


def main(device: str, dtype: str) -> None:
    while True:
        tell(speed=gemm_speed(torch.device(device), getattr(torch, dtype)))


if __name__ == "__main__":
    main(*sys.argv[1:])
