"""Which way to the loss of a head is fastest in bounded memory: forward and backward, beside plain logits?

    python benchmarks/head_loss.py
    python benchmarks/head_loss.py --tokens 256 --dtype bfloat16 --repeats 3
    python benchmarks/head_loss.py --device cuda --hidden 4096 --dtype bfloat16 --tokens 4096 16384

The loss is the sum over tokens of a factor times the NLL; each of ``--conversations`` conversations has its own factor.

- plain: all logits at once, then cross entropy
- checkpointed: in chunks of rows, each computed again in the backward pass, as this program does for unknown heads
- fused: in chunks of rows, whose gradients are made in the forward pass, as it does for linear ones; these two also
  tell which targets were the most likely tokens
- lce none: ``F.linear_cross_entropy(reduction="none")``, which takes a factor for each token and computes twice
- lce sum: the same with ``reduction="sum"``, which does not: it is called once for each conversation
- lce one: the same, called once, as if all factors were equal; not a solution, but how fast it could be

Rows "auto" are torch's default options, and rows with an "a" the policy "accurate". For each number of tokens, type and
head, trained or frozen, the table has the median seconds, measured in turns; their ratio to plain's; the peak memory
beyond inputs and accumulated gradients in MiB, in a process of its own (on a CPU the resident memory, which Linux alone
tells); and the relative errors of the loss and of the gradients of the hidden states and of the weight against float64.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mft_lightning.model.head_loss import head_loss
from mft_lightning.model.logit_buffer import LogitBuffer
from mft_lightning.model.objective import Objective


class Case(NamedTuple):
    """One way and how it is set."""

    way: str
    rows: int | None = None
    policy: str = "auto"

    def __str__(self) -> str:
        rows = "all" if self.way == "plain" else str(self.rows or "auto")
        return f"{self.way:12} {rows + 'a' * (self.policy == 'accurate'):>6}"


class Inputs(NamedTuple):
    """What the loss is computed from: conversations lie one after another and are equally long, but for the last."""

    head: nn.Linear
    hidden: Tensor
    targets: Tensor
    factors: Tensor
    lengths: list[int]
    logits: LogitBuffer


def make_inputs(options: argparse.Namespace, tokens: int, dtype: torch.dtype, trained: bool) -> Inputs:
    torch.manual_seed(0)
    device, shape = options.device, (options.hidden, options.vocabulary)
    head = nn.Linear(*shape, bias=False, device=device, dtype=dtype).requires_grad_(trained)
    with torch.no_grad():
        for rows in head.weight.split(4096):  # no copy in float32 of the whole, which a peak would remember
            rows.normal_(std=0.04)
    if trained:
        head.weight.grad = torch.zeros_like(head.weight)  # of an earlier micro-batch
    hidden = torch.randn(tokens, options.hidden, device=device).to(dtype).requires_grad_()
    targets = torch.randint(options.vocabulary, (tokens,), device=device)
    lengths = [len(part) for part in targets.chunk(options.conversations)]
    factors = (torch.rand(len(lengths)) + 0.5).repeat_interleave(torch.tensor(lengths)) / tokens
    return Inputs(head, hidden, targets, factors.to(device), lengths, LogitBuffer())


class Unknown(nn.Module):
    """A head that is not known to be linear, whose chunks are computed again in the backward pass."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)


def loss_of(case: Case, data: Inputs) -> Tensor:
    head, hidden, targets, factors, lengths, buffer = data
    if case.way == "plain":
        return (F.cross_entropy(head(hidden).float(), targets, reduction="none") * factors).sum()
    if case.way in ("checkpointed", "fused"):
        assert case.rows is not None
        either = head if case.way == "fused" else Unknown(head)
        return head_loss(either, hidden, targets, factors, Objective(), case.rows, buffer).loss
    policy: dict[str, Any] = {} if case.policy == "auto" else {"acc_policy": case.policy, "acc_dtype": torch.float32}
    settings = nn.LinearCrossEntropyOptions(batch_chunk_size=case.rows, **policy)

    def lce(x: Tensor, target: Tensor, reduction: str) -> Tensor:
        return F.linear_cross_entropy(x, head.weight, target, reduction=reduction, options=settings).float()

    if case.way != "lce sum":
        one = case.way == "lce one"
        return lce(hidden, targets, "sum") * factors.mean() if one else (lce(hidden, targets, "none") * factors).sum()
    parts = zip(hidden.split(lengths), targets.split(lengths), factors.split(lengths), strict=True)
    return torch.stack([lce(x, target, "sum") * factor[0] for x, target, factor in parts]).sum()


def run(case: Case, data: Inputs) -> tuple[Tensor, float]:
    """The loss, and the seconds until its gradients are there."""
    synchronize: Callable[[], None] = torch.cuda.synchronize if data.hidden.is_cuda else lambda: None
    data.hidden.grad = None
    data.head.zero_grad(set_to_none=False)
    synchronize()
    start = time.perf_counter()
    loss = loss_of(case, data)
    loss.backward()
    synchronize()
    return loss.detach(), time.perf_counter() - start


def exact(data: Inputs) -> list[Tensor]:
    """Loss and gradients in float64; 256 tokens at a time, as all logits would be large."""
    weight = data.head.weight.detach().double().requires_grad_(data.head.weight.requires_grad)
    hidden, loss = data.hidden.detach().double().requires_grad_(), weight.new_zeros(())
    for x, target, factor in zip(*(found.split(256) for found in (hidden, data.targets, data.factors)), strict=True):
        part = (F.cross_entropy(x @ weight.T, target, reduction="none") * factor).sum()
        part.backward()
        loss += part.detach()
    return [found for found in (loss, hidden.grad, weight.grad) if found is not None]


def errors(case: Case, data: Inputs, expected: list[Tensor]) -> list[float]:
    found = [run(case, data)[0], data.hidden.grad, data.head.weight.grad]
    pairs = zip([tensor for tensor in found if tensor is not None], expected, strict=True)
    return [float((ours.double() - theirs).norm() / theirs.norm()) for ours, theirs in pairs]


def timings(cases: list[Case], options: argparse.Namespace, *setting: Any) -> list[tuple[float, list[float]]]:
    data = make_inputs(options, *setting)
    expected = exact(data)
    wrong = [[] if case.way == "lce one" else errors(case, data, expected) for case in cases]  # and warms up
    rounds = [[run(case, data)[1] for case in cases] for _ in range(options.repeats)]
    return list(zip(map(statistics.median, zip(*rounds, strict=True)), wrong, strict=True))


def peak_mib(case: Case, options: argparse.Namespace, *setting: Any) -> float:
    """What ``case`` needs beyond what is there before, in a process that has done nothing else."""
    data = make_inputs(options, *setting)
    small = nn.Linear(8, 16, bias=False, device=data.hidden.device, dtype=data.hidden.dtype)
    hidden = torch.randn(4, 8, device=data.hidden.device, dtype=data.hidden.dtype, requires_grad=True)
    run(case, Inputs(small, hidden, data.targets[:4] % 16, data.factors[:4], [4], LogitBuffer()))  # loads libraries
    if data.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(case, data)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    run(case, data)
    return (resident("VmHWM") - before) / 2**10


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def all_cases(options: argparse.Namespace, tokens: int) -> list[Case]:
    rows = sorted({min(count, tokens) for count in options.rows})
    cases = [Case("plain"), *(Case(way, count) for way in ("checkpointed", "fused") for count in rows)]
    for way in ("lce none", "lce sum", "lce one"):
        cases += [Case(way), *(Case(way, count) for count in rows), Case(way, rows[-1], policy="accurate")]
    return [case for case in cases if case.way in options.ways]


def table(options: argparse.Namespace, processes: Any, tokens: int, dtype: str, trained: bool) -> None:
    """Measure in processes of their own, and print."""
    cases, setting = all_cases(options, tokens), (options, tokens, getattr(torch, dtype), trained)
    print(f"\n{tokens} tokens, {dtype}, head {'trained' if trained else 'frozen'}")
    print(f"{'way':12} {'rows':>6} {'s':>8} {'ratio':>6} {'MiB':>6}  errors: loss, hidden, weight", flush=True)
    timed = processes.apply(timings, (cases, *setting))
    for case, (seconds, wrong) in zip(cases, timed, strict=True):
        mib, told = processes.apply(peak_mib, (case, *setting)), " ".join(f"{error:.0e}" for error in wrong)
        print(f"{case} {seconds:8.3f} {seconds / timed[0][0]:6.2f} {mib:6.0f}  {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--head", nargs="+", choices=["trained", "frozen"], default=["trained", "frozen"])
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024], help="chunk sizes")
    ways = ["plain", "checkpointed", "fused", "lce none", "lce sum", "lce one"]
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways, help="ratios are to the first")
    parser.add_argument("--conversations", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as processes:  # this one never computes
        on_cpu = options.device == "cpu"
        device = f"{torch.get_num_threads()} CPU threads" if on_cpu else processes.apply(torch.cuda.get_device_name)
        print(f"hidden {options.hidden}, vocabulary {options.vocabulary}, torch {torch.__version__}, {device}")
        for dtype, tokens, head in product(options.dtype, options.tokens, options.head):
            table(options, processes, tokens, dtype, head == "trained")


if __name__ == "__main__":
    main()
