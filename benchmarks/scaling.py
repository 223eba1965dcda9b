"""How a step's time, communication and memory grow with the processes, beside what a cost model says of them.

    python benchmarks/scaling.py [--layouts one,ddp2,ddp4,fsdp2,fsdp4,tensor2,fsdp2-tensor2] [--rounds 2]
    python benchmarks/scaling.py --estimate

The first runs ``fit`` on a random GPT-NeoX and the examples' conversations, the same number per process in every layout
(weak scaling), layouts in turns. Steps are timed first, then a few are profiled: torch's profiler records every
collective's shape and the time from its begin to its end in gloo's threads. A step's share of communication is the time
in which at least one of them is under way, waiting for other ranks included, whether the rank computes meanwhile or
not. Memory is the highest private memory of any rank above what it had before the model. Bytes are those that a rank
sends in a ring; elements are float32. From one and two processes come two constants, seconds per FLOP and per byte, and
from these the four-process layouts are predicted. gloo carries a reduce-scatter as an all-reduce of the same size.

``--estimate`` prints what the model (``benchmarks/gpu_estimate.py``) says of GPUs. Nothing of that has been run.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
from torch.profiler import ProfilerActivity, profile

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cost_model import (
    FLOAT32,
    MODELS,
    Collective,
    Layout,
    Micro,
    Shape,
    collectives,
    memory,
    step_flops,
)
from benchmarks.gpu_estimate import Hardware, best

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
LAYOUTS = {
    "one": Layout("one", 1),
    "ddp2": Layout("ddp", 2),
    "ddp4": Layout("ddp", 4),
    "fsdp2": Layout("fsdp", 2),
    "fsdp4": Layout("fsdp", 4),
    "tensor2": Layout("fsdp", 2, 2),
    "fsdp2-tensor2": Layout("fsdp", 4, 2),
}
WARM, PROFILED = 2, 2  # steps
SMALL = 256  # elements; smaller messages are bookkeeping: norms, sums for the logs


def private() -> int:
    """Bytes of this process that are not a file's."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024


class Meter(L.Callback):
    """Writes what a rank measured of its steps as JSON.

    Args:
        directory: where to, a file per rank.
        steps: how many are timed, after those that warm up and before those that are profiled.
    """

    def __init__(self, directory: str, steps: int) -> None:
        self.directory, self.steps = Path(directory), steps
        self.before = self.highest = private()
        self.seconds: list[float] = []
        self.core_seconds: list[float] = []
        self.work: list[list[Micro]] = []
        self.profiled: list[dict[str, Any]] = []
        self.profile: profile | None = None
        self.done = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.highest = max(self.highest, private())

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, number: int) -> None:
        if number == WARM + self.steps:
            self.done.set()  # the profiler's own memory is not the step's
        if number >= WARM + self.steps:
            self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self.profile.__enter__()
        self.work.append([micro_of(micro) for micro in batch.micros])
        self.began = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, number: int) -> None:
        seconds, cores = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        if self.profile is not None:
            self.profile.__exit__(None, None, None)
            events = list(self.profile.events() or ())
            self.profiled.append({"counted": counted(events), "share": under_way(events) / seconds})
        elif number >= WARM:
            self.seconds.append(seconds)
            self.core_seconds.append(cores)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        told = {
            "seconds": self.seconds,
            "core_seconds": self.core_seconds,
            "work": [[asdict(micro) for micro in micros] for micros in self.work[WARM:]],
            "profiled": self.profiled,
            "peak": self.highest - self.before,
        }
        (self.directory / f"{trainer.global_rank}.json").write_text(json.dumps(told))


def micro_of(batch: Any) -> Micro:
    """What the model needs to know of a packed micro-batch."""
    lengths = batch.packed_lengths or (batch.input_ids.shape[1],) * batch.input_ids.shape[0]
    return Micro(batch.input_ids.numel(), len(batch.targets), sum(length**2 for length in lengths))


def counted(events: Sequence[Any]) -> list[tuple[str, int, int, int]]:
    """Kind, elements of the whole message, devices (0 where the event does not tell) and times."""
    found: Counter[tuple[str, int, int]] = Counter()
    for event in events:
        shapes = event.input_shapes
        if event.name == "c10d::_allgather_base_":
            found["all_gather", shapes[0][0], shapes[0][0] // shapes[1][0]] += 1
        elif event.name == "c10d::_reduce_scatter_base_":
            found["reduce_scatter", shapes[1][0], shapes[1][0] // shapes[0][0]] += 1
            found["all_reduce", shapes[1][0], 0] -= 1  # as which gloo carries it
        elif event.name == "gloo:all_reduce":
            size = 1
            for length in shapes[0]:
                size *= length
            found["all_reduce", size, 0] += 1
    return [(*key, times) for key, times in found.items() if times and key[1] >= SMALL]


def under_way(events: Sequence[Any]) -> float:
    """Seconds in which at least one collective was."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.name.startswith("gloo:"))
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e6


@dataclass
class Measured:
    """Of the ranks of one run: medians of seconds and shares, sums of core-seconds, rank 0's bytes."""

    seconds: list[float]
    core_seconds: list[float]
    flops: float  # of all ranks, per step
    carried: float  # bytes that all ranks send per step, as gloo carries them
    sent: dict[str, float]  # rank 0's in a profiled step
    predicted: dict[str, float]
    share: list[float]
    peak: int
    expected_memory: float
    tokens: float


def fit(name: str, model: Path, shape: Shape, options: argparse.Namespace) -> Measured:
    """Run ``fit`` in a layout."""
    layout = LAYOUTS[name]
    with tempfile.TemporaryDirectory() as place:
        words = [sys.executable, "-m", "mft_lightning", "fit", "--config", str(ROOT / "configs" / "full.yaml")]
        words += ["--model.pretrained_model_path", str(model), "--output_dir", f"{place}/run"]
        words += ["--trainer.max_steps", str(WARM + options.steps + PROFILED), "--trainer.max_epochs", "100"]
        words += ["--evaluation.strategy", "none", "--trainer.devices", str(layout.devices)]
        words += ["--data.total_train_batch_size", str(options.conversations * layout.devices)]
        per_device = options.conversations * layout.tensor // options.micro_batches
        words += ["--data.per_device_train_batch_size", str(per_device)]
        if options.checkpoint_activations:
            words += ["--model.checkpoint_activations", "true"]
        words += ["--trainer.callbacks+", "benchmarks.scaling.Meter", f"--trainer.callbacks.directory={place}"]
        words += [f"--trainer.callbacks.steps={options.steps}"]
        if layout.devices > 1:
            words += ["--trainer.strategy", layout.strategy]
        if layout.tensor > 1:
            words += ["--parallel.tensor_parallel_size", str(layout.tensor)]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # so that what is freed is given back, and not counted
        done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        ranks = [json.loads(Path(place, f"{rank}.json").read_text()) for rank in range(layout.devices)]
    return summed(layout, shape, ranks, options.checkpoint_activations)


def summed(layout: Layout, shape: Shape, ranks: list[dict[str, Any]], checkpointing: bool) -> Measured:
    layout = Layout(layout.strategy, layout.devices, layout.tensor, checkpointing)
    work = [[[Micro(**micro) for micro in micros] for micros in rank["work"]] for rank in ranks]
    timed = len(ranks[0]["seconds"])
    flops = sum(step_flops(shape, layout, micros) for rank in work for micros in rank[:timed]) / timed
    carried = 0.0
    for rank in work:
        for micros in rank[:timed]:
            carried += sum(as_carried(one) for one in collectives(shape, layout, micros, FLOAT32)) / timed
    sent: defaultdict[str, float] = defaultdict(float)
    for kind, size, group, times in ranks[0]["profiled"][0]["counted"]:
        one = Collective(kind, 4 * size, group or (layout.tensor if layout.tensor > 1 else layout.data), times)
        sent[kind] += one.sent
    predicted: defaultdict[str, float] = defaultdict(float)
    for one in collectives(shape, layout, work[0][timed], FLOAT32):
        predicted[one.kind] += one.sent
    held = max(
        sum(memory(shape, layout, micros, FLOAT32, logits(shape, layout, micros)).values())
        for rank in work
        for micros in rank
    )
    return Measured(
        seconds=ranks[0]["seconds"],
        core_seconds=[sum(step) for step in zip(*(rank["core_seconds"] for rank in ranks), strict=True)],
        flops=flops,
        carried=carried,
        sent=dict(sent),
        predicted=dict(predicted),
        share=[step["share"] for step in ranks[0]["profiled"]],
        peak=max(rank["peak"] for rank in ranks),
        expected_memory=held,
        tokens=sum(micro.tokens for rank in work for micros in rank[:timed] for micro in micros)
        / timed
        / layout.tensor,
    )


def logits(shape: Shape, layout: Layout, micros: list[Micro]) -> float:
    return min(128 * MIB, 4.0 * shape.vocabulary / layout.tensor * max(micro.supervised for micro in micros))


def as_carried(one: Collective) -> float:
    return one.sent * (2 if one.kind == "reduce_scatter" else 1)


def together(rounds: list[Measured]) -> Measured:
    """The rounds of one layout as one."""
    first = rounds[0]
    first.seconds = [value for one in rounds for value in one.seconds]
    first.core_seconds = [value for one in rounds for value in one.core_seconds]
    first.share = [value for one in rounds for value in one.share]
    first.peak = max(one.peak for one in rounds)
    return first


def predictions(found: dict[str, Measured], cores: int) -> tuple[dict[str, tuple[float, float]], tuple[float, float]]:
    """Core-seconds of all ranks and seconds of a step; core-seconds per FLOP and byte are from one and two processes.

    Processes beyond the cores share them, so that a step takes no less than its core-seconds by the cores.
    """
    per_flop = statistics.median(found["one"].core_seconds) / found["one"].flops
    two = [one for name, one in found.items() if LAYOUTS[name].devices == 2]
    rest = sum(statistics.median(one.core_seconds) - one.flops * per_flop for one in two)
    per_byte = max(0.0, rest / sum(one.carried for one in two)) if two else 0.0
    waiting = statistics.median(found["one"].seconds) / statistics.median(found["one"].core_seconds)
    told = {}
    for name, one in found.items():
        total = one.flops * per_flop + one.carried * per_byte
        told[name] = total, total / min(cores, LAYOUTS[name].devices) * waiting
    return told, (per_flop, per_byte)


def measure(options: argparse.Namespace) -> None:
    names = options.layouts.split(",")
    heads = options.hidden // 64
    cores = len(os.sched_getaffinity(0))
    config = json.loads((ROOT / "examples" / "model" / "config.json").read_text())
    config |= {"hidden_size": options.hidden, "num_hidden_layers": options.layers, "num_attention_heads": heads}
    config["intermediate_size"] = 4 * options.hidden
    shape = Shape(options.hidden, options.layers, 4 * options.hidden, config["vocab_size"])
    found: dict[str, list[Measured]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        shutil.copytree(ROOT / "examples" / "model", model)
        (model / "config.json").write_text(json.dumps(config))
        for _ in range(options.rounds):
            for name in names:
                found[name].append(fit(name, model, shape, options))
    whole = {name: together(rounds) for name, rounds in found.items()}
    print(
        f"{shape.parameters():,} parameters, {options.conversations} conversations per process and step in "
        f"{options.micro_batches} micro-batches, float32, gloo.\n{cores} cores: layouts of more processes share them, "
        "so their steps take longer for that alone; compare core-seconds.\n"
    )
    print("layout         tokens/step  step s  core-s/step  core-ms/token  collectives under way  peak MiB  model MiB")
    for name, one in whole.items():
        core = statistics.median(one.core_seconds)
        print(
            f"{name:14} {one.tokens:11.0f}  {statistics.median(one.seconds):6.3f}  {core:11.3f}  "
            f"{1e3 * core / one.tokens:13.3f}  {statistics.median(one.share):21.0%}  {one.peak / MIB:8.0f}  "
            f"{one.expected_memory / MIB:9.0f}"
        )
    print("\nlayout         kind            MiB sent per rank and step  by the formula  equal")
    for name, one in whole.items():
        for kind in sorted(one.sent.keys() | one.predicted.keys()):
            counts, formula = one.sent.get(kind, 0.0), one.predicted.get(kind, 0.0)
            print(f"{name:14} {kind:14}  {counts / MIB:26.3f}  {formula / MIB:14.3f}  {counts == formula}")
    if "one" not in whole:
        return
    told, (per_flop, per_byte) = predictions(whole, cores)
    print(f"\nFrom one and two processes: {per_flop * 1e9:.4f} core-s per GFLOP, {per_byte * 2**30:.2f} per GiB sent")
    print("layout         core-s/step  predicted  of measured  step s  predicted  of measured")
    for name, one in whole.items():
        core, step = statistics.median(one.core_seconds), statistics.median(one.seconds)
        of_core, of_step = told[name]
        print(
            f"{name:14} {core:11.3f}  {of_core:9.3f}  {of_core / core:11.2f}  {step:6.3f}  {of_step:9.3f}  "
            f"{of_step / step:11.2f}"
        )


def print_estimates(tokens: int, length: int, supervised: float) -> None:
    hardware = Hardware()
    micro = Micro(tokens, int(tokens * supervised), tokens * length)
    print(
        f"ESTIMATES, not run on a GPU: H100 SXM, bf16-mixed, one micro-batch of {tokens:,} tokens per GPU and step in\n"
        f"conversations of {length:,}, {supervised:.0%} of them supervised.\n"
    )
    print("| model | GPUs | layout | activations | GB per GPU | step s | communication | tokens/s per GPU | of peak |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, shape in MODELS.items():
        for devices in (8, 64, 256, 1024):
            one = best(shape, devices, micro, hardware)
            if one is None:
                print(f"| {name} | {devices} | none fits | | | | | | |")
                continue
            layout = one.layout.strategy + (f", tensor {one.layout.tensor}" if one.layout.tensor > 1 else "")
            print(
                f"| {name} | {devices:,} | {layout} | {'again' if one.layout.checkpointing else 'kept'} | "
                f"{one.bytes / 1e9:.0f} | {one.seconds:.2f} | {one.communicating / one.seconds:.0%} | "
                f"{tokens / one.seconds:,.0f} | {one.useful / one.seconds / hardware.peak:.0%} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--conversations", type=int, default=8, help="per process and step")
    parser.add_argument("--micro_batches", type=int, default=1, help="that a step's conversations are computed in")
    parser.add_argument("--checkpoint_activations", action="store_true")
    parser.add_argument("--steps", type=int, default=8, help="that are timed, in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--estimate", action="store_true", help="print the model's table for GPUs; nothing is run")
    parser.add_argument("--tokens", type=int, default=16384, help="of the estimate: per GPU and step")
    parser.add_argument("--length", type=int, default=1024, help="of the estimate: of a conversation")
    parser.add_argument("--supervised", type=float, default=0.5, help="of the estimate: share of tokens")
    options = parser.parse_args()
    if options.estimate:
        print_estimates(options.tokens, options.length, options.supervised)
    else:
        measure(options)


if __name__ == "__main__":
    main()
