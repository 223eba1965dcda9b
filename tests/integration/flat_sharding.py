"""Commands in series with FSDP1 on CPUs, where torch can do it but Lightning and this program do not let it."""

from __future__ import annotations

import runpy

from mft_lightning.training import strategies

if __name__ == "__main__":
    strategies.cuda_is_available = lambda: True
    runpy.run_module("tests.integration.in_series", run_name="__main__")
