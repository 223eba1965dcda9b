"""Where the time of an optimizer step goes, beside the least it could take: a step's budget and its roofline.

    python benchmarks/step_budget.py --model DIR --data TASK TASK --precision bf16-true
    python benchmarks/step_budget.py --model DIR --data TASK TASK --method qlora --steps 8 --operators 25

Runs ``fit``, packed, on a GPT-NeoX's configuration (weights are drawn), and profiles every second of its steps with
torch's profiler. Nothing is computed otherwise than in any run: modules' names are regions of the profile by forward
hooks, except for the head, whose loss is a function; what an operation does on the way back is known by autograd's
number of it. A region's time is what passes in it and in no region inside, Python between operations included. A step
begins where Lightning asks for a batch and ends where it asks for the next. Least time: the larger of matrix products
at the speed of square ones and of bytes at the speed of a large copy (``benchmarks/roofline.py``), the best of those
measured between the steps; GFLOP and MB are of a step. On CUDA (not yet run on a GPU) a part's time is that of its
kernels, and what is not accounted for is when the device waits.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import lightning as L
import torch
from torch.profiler import ProfilerActivity
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import roofline
from benchmarks.few_steps import run_steps, steps_parser
from benchmarks.roofline import ATTENTION, HEAD
from benchmarks.step_regions import PARTS, WARM_UP, Regions, attribute, labelled, name_parts
from mft_lightning.data.collate import StepBatch
from mft_lightning.model import supervised_loss
from mft_lightning.model.gemm_peak import gemm_speed
from mft_lightning.model.module import MFTModule


class Budget(L.Callback):
    """``--trainer.callbacks+=benchmarks.step_budget.Budget``: prints the budget when training ends.

    Args:
        operators: how many operators to list besides.
    """

    def __init__(self, operators: int = 0) -> None:
        self.operators = operators
        self.batches: list[StepBatch] = []
        self.speeds: list[tuple[float, float]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.cuda = trainer.strategy.root_device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        settle = torch.cuda.synchronize if self.cuda else lambda: None
        self.regions = Regions(activities, settle, lambda: self.speeds.append(self._speeds(pl_module)))
        trainer.profiler = self.regions

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        lm = cast(Any, pl_module).network.causal_lm
        name_parts(lm.base_model)
        name = lm.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS[name]
        self.in_place = ExitStack()  # until the run ends
        self.in_place.callback(ALL_ATTENTION_FUNCTIONS.register, name, attention)
        ALL_ATTENTION_FUNCTIONS.register(name, labelled(ATTENTION, attention))
        loss = labelled(HEAD, supervised_loss.head_loss)
        self.in_place.enter_context(patch.object(supervised_loss, "head_loss", loss))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: StepBatch, batch_idx: int) -> None:
        self.batches.append(batch)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.in_place.close()
        module = cast(MFTModule, pl_module)
        gemm, copy = map(max, zip(*self.speeds, strict=True))
        clipped = bool(trainer.gradient_clip_val)
        steps, count = self.regions.profiled, len(self.regions.profiled)
        works = roofline.total(roofline.work_of_step(module, self.batches[step], clipped=clipped) for step in steps)
        spent, operators = Counter[tuple[str, str]](), Counter[tuple[str, str, str]]()
        for _, events in steps.values():
            spent_in, by_operator = attribute(events, cuda=self.cuda)
            spent += spent_in
            operators += by_operator
        seconds = sum(taken for taken, _ in steps.values())
        work = [self.batches[step] for step in steps]
        tokens, supervised = (sum(getattr(one, name) for one in work) / count for name in ("tokens", "supervised"))
        print(f"\n{count} steps of {tokens:,.0f} tokens on average, {supervised:,.0f} of them supervised")
        print(f"GEMM {gemm / 1e9:,.0f} GFLOP/s, copy {copy / 1e9:.1f} GB/s, {torch.get_num_threads()} threads\n")
        print("| part | forward ms | backward ms | together | share | GFLOP | MB | least ms | times |\n|" + "---|" * 9)
        for part in PARTS:
            ahead, back = (spent[part, way] for way in ("forward", "backward"))
            cells = [f"{1e3 * each / count:.1f}" for each in (ahead, back, ahead + back)]
            cells.append(f"{(ahead + back) / seconds:.1%}")
            cells += roofline_cells(works[part], ahead + back, gemm, copy, count) if part in works else [""] * 4
            print(f"| {part} | {' | '.join(cells)} |")
        whole = roofline.Work(sum(one.flops for one in works.values()), sum(one.moved for one in works.values()))
        least = sum(one.seconds(gemm, copy) for one in works.values())
        cells = [f"{1e3 * seconds / count:.1f}", "", f"{whole.flops / count / 1e9:.1f}"]
        cells += [f"{whole.moved / count / 1e6:.0f}", f"{1e3 * least / count:.1f}", f"{seconds / least:.1f}"]
        print(f"| a step | | | {' | '.join(cells)} |\n\nnot accounted for: {1 - sum(spent.values()) / seconds:.2%}")
        profiled = self._per_token({step: taken for step, (taken, _) in steps.items()})
        more = profiled / self._per_token(self.regions.plain) - 1
        print(f"a token takes {more:+.1%} in steps that are profiled, beside those that are not")
        for (part, way, name), taken in operators.most_common(self.operators):
            print(f"{1e3 * taken / count:8.1f} ms  {part}, {way}: {name}")

    def _speeds(self, module: Any) -> tuple[float, float]:
        return gemm_speed(module.device, module.product_dtype), roofline.copy_speed(module.device)

    def _per_token(self, seconds: dict[int, float]) -> float:
        return statistics.median(taken / self.batches[step].tokens for step, taken in seconds.items())


def roofline_cells(work: roofline.Work, seconds: float, gemm: float, copy: float, count: int) -> list[str]:
    least = work.seconds(gemm, copy)
    found = [f"{work.flops / count / 1e9:.1f}", f"{work.moved / count / 1e6:.0f}", f"{1e3 * least / count:.1f}"]
    return [*found, f"{seconds / least:.1f}"]


def main(argv: list[str] | None = None) -> int:
    parser = steps_parser(__doc__, "that are profiled")
    parser.add_argument("--operators", type=int, default=0, help="that take most, to list besides")
    options = parser.parse_args(argv)
    callback = f'[{{"class_path": "benchmarks.step_budget.Budget", "init_args": {{"operators": {options.operators}}}}}]'
    return run_steps(options, WARM_UP + 2 * options.steps, "--trainer.callbacks", callback)


if __name__ == "__main__":
    raise SystemExit(main())
