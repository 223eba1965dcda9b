"""How long planning an epoch of ten million conversations takes, and how much memory, beside the limits.

    python benchmarks/plan.py [--conversations 10000000] [--packed false]

Each line is a process of its own: it plans the epoch and looks at every global batch, ``dealing`` deals every one to 8
ranks as well. The memory is the process's peak beyond what it held before the lengths were there. Ends with 1 where a
limit is not held.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SECONDS, GIB = 30.0, 2.0
WORLD, TOTAL, PER_DEVICE, TOKENS, LONGEST = 8, 32, 4, 16_384, 2_048
ROOT = Path(__file__).resolve().parents[1]


def peak() -> int:
    """Bytes of this process's largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(case: str, conversations: int, packed: bool) -> None:
    """Plan one epoch in this process, and print its seconds, bytes and steps."""
    sys.path.insert(0, str(ROOT))
    from mft_lightning.data.batch_sizes import derive_batch_sizes
    from mft_lightning.data.plan import Plan
    from mft_lightning.data.sampling import TaskSampling
    from mft_lightning.data.whole_steps import in_whole_steps

    before = peak()
    rng = np.random.default_rng(0)
    lengths = np.empty(conversations, dtype=np.int32)
    for part in np.array_split(lengths, 100):  # in parts, so that making them is not what is measured
        part[:] = np.clip(rng.lognormal(5.5, 1.0, len(part)), 2, LONGEST)
    tokens = TOKENS if "tokens" in case else None
    sizes = derive_batch_sizes(None if tokens else TOTAL, PER_DEVICE, None, WORLD, tokens)
    draws = None
    start = time.perf_counter()
    if "temperature" in case:
        tasks = np.repeat(np.arange(4), np.array([50, 30, 15, 5]) * conversations // 100)
        draws = TaskSampling(temperature=2.0).draws(tasks, ["a", "b", "c", "d"], seed=1)
        draws = in_whole_steps(draws, lengths, tokens) if draws and tokens else draws
    plan = Plan(lengths=lengths, sizes=sizes, packed=packed, seed=1, draws=draws)
    planned = 0
    for step in range(plan.steps_per_epoch):
        batch = plan.global_batch(0, step)
        planned += len(batch)
        if "dealing" in case:
            plan.deal_to_all(batch, WORLD)
    assert planned == conversations or (tokens and draws and planned > 0.95 * conversations)
    print(time.perf_counter() - start, peak() - before, plan.steps_per_epoch)


def main() -> int:
    """Every case in a process of its own, beside the limits."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--conversations", type=int, default=10_000_000)
    parser.add_argument("--packed", choices=("true", "false"), default="true")
    parser.add_argument("--case")
    options = parser.parse_args()
    if options.case:
        measure(options.case, options.conversations, options.packed == "true")
        return 0
    cases = {
        "batches": f"batches of {TOTAL}",
        "batches, dealing": f"batches of {TOTAL}, each dealt to {WORLD} ranks",
        "tokens": f"batches of {TOKENS:,} tokens",
        "tokens, dealing": f"batches of {TOKENS:,} tokens, each dealt to {WORLD} ranks",
        "temperature": f"batches of {TOTAL}, tasks at temperature 2",
        "temperature, tokens": f"batches of {TOKENS:,} tokens, tasks at temperature 2",
    }
    print(f"an epoch of {options.conversations:,} conversations; limits: {SECONDS:g} s and {GIB:g} GiB")
    held = True
    for case, said in cases.items():
        words = ["--case", case, "--conversations", str(options.conversations), "--packed", options.packed]
        result = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
        seconds, memory, steps = (float(word) for word in result.stdout.split())
        within = seconds < SECONDS and memory < GIB * 2**30
        held &= within
        over = "" if within else "   OVER"
        print(f"{said:<55} {steps:>9,.0f} steps {seconds:6.1f} s {memory / 2**30:6.2f} GiB{over}", flush=True)
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
