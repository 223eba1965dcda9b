"""Commands in series with DeepSpeed on CPUs, where it can do it but Lightning and this program do not let it."""

from __future__ import annotations

import argparse
import runpy
from typing import Any

import deepspeed

from mft_lightning.training import strategies

initialize = deepspeed.initialize


def without_a_device(**arguments: Any) -> Any:
    return initialize(**{**arguments, "args": argparse.Namespace(device_rank=-1)})


if __name__ == "__main__":
    strategies.cuda_is_available = lambda: True
    deepspeed.initialize = without_a_device
    runpy.run_module("tests.integration.in_series", run_name="__main__")
