"""A sharded network holds, gives and answers what the whole one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mft_lightning.errors import NotYetError
from mft_lightning.model.parallel import ParallelSettings

ROOT = Path(__file__).resolve().parents[2]


def test_a_sharded_network_on_two_ranks(tiny_model: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*torchrun, str(ROOT / "tests" / "model" / "on_two_ranks.py"), str(tiny_model)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "all as before\n"


def test_tensor_parallelism_is_refused() -> None:
    with pytest.raises(NotYetError, match=r"parallel\.tensor_parallel_size: 2"):
        ParallelSettings(tensor_parallel_size=2)
