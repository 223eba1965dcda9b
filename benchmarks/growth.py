"""How a step's time and memory grow with the work: sequence length, batch, vocabulary, tasks, corpus.

    python benchmarks/growth.py --output growth                every axis, about ten minutes on two cores
    python benchmarks/growth.py --only tasks corpus --quick    some axes, at three points each

Along an axis all else stays as it is. Every point is a ``fit`` in a process of its own: a random GPT-NeoX in float32
with AdamW on packed conversations of random tokens, which are written through the token cache's own writer rather than
encoded from text. The growth of a quantity is the exponent e of y = a x^e, fitted to the upper half of an axis's points
by least squares on logarithms. The exit code is 1 where it is more than the expected one and a tolerance. --output gets
a picture of every axis (matplotlib, the extra ``plots``) and the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.growth_points import MIB, Measured, Point, measure
from mft_lightning.commands.figures import require_matplotlib
from mft_lightning.errors import UserError
from mft_lightning.quiet import quieten

TOLERANCE = 0.15
FLOPS = "that of the operations"  # expected of a step's time: what is to be computed grows so


@dataclass(frozen=True)
class Curve:
    """A quantity along an axis.

    Attributes:
        name: with its unit.
        of: the quantity, of what was measured.
        expected: the exponent that is not to be exceeded, or ``FLOPS``.
    """

    name: str
    of: Callable[[Measured], float]
    expected: float | str


@dataclass(frozen=True)
class Axis:
    """Points that differ in one thing.

    Attributes:
        grows: what does.
        fixed: what does not, in words.
        points: by what grows.
        curves: what is looked at.
    """

    grows: str
    fixed: str
    points: dict[int, Point]
    curves: Sequence[Curve]


def step(expected: float | str) -> Curve:
    return Curve("step s", lambda found: found.step, expected)


def memory(expected: float) -> Curve:
    return Curve("step MiB", lambda found: found.memory / MIB, expected)


START = Curve("launch to step 1 s", lambda found: found.start, 0)
PLAN = Curve("plan s", lambda found: found.plan, 1.15)  # a shuffle of more than the caches hold is slower for each
RESIDENT = Curve("resident MiB", lambda found: found.resident / MIB, 1)  # of each conversation its length and task
VALIDATION = Curve("validation s", lambda found: found.validation, 0)
SMALL = Point(length=64, batch=32, micro=32, hidden=64, steps=20)
WIDE = Point(length=512, batch=6, micro=6, hidden=64, steps=4)
AXES = {
    "length": Axis(
        "tokens of a conversation",
        "8,192 tokens a step, in one micro-batch; 128 wide, 2 layers",
        {
            n: Point(length=n, batch=8192 // n, micro=8192 // n, conversations=200)
            for n in (512, 1024, 2048, 4096, 8192)
        },
        [step(FLOPS), memory(0)],
    ),
    "batch": Axis(
        "conversations of a step",
        "256 tokens each, micro-batches of 8 conversations; 128 wide, 2 layers",
        {n: Point(batch=n) for n in (8, 16, 32, 64, 128)},
        [step(FLOPS), memory(0)],
    ),
    "micro-batch": Axis(
        "conversations of a step",
        "256 tokens each, one micro-batch; 128 wide, 2 layers",
        {n: Point(batch=n, micro=n) for n in (8, 16, 32, 64, 128)},
        [step(FLOPS), memory(1)],
    ),
    "vocabulary": Axis(
        "tokens of the vocabulary",
        "6 conversations of 512 tokens; 64 wide, 2 layers",
        {n: replace(WIDE, vocabulary=n) for n in (50_000, 100_000, 150_000, 200_000, 250_000)},
        [step(FLOPS), memory(0)],
    ),
    "tasks": Axis(
        "tasks",
        "9,000 conversations of 64 tokens, 32 a step, a tenth validated; 64 wide, 2 layers",
        {n: replace(SMALL, tasks=n, conversations=9000, validated=True) for n in (3, 10, 30, 100, 300)},
        [step(0), memory(0), VALIDATION, START],
    ),
    "corpus": Axis(
        "conversations of the corpus",
        "24 tokens each, 32 a step, 3 tasks, a warm cache; 64 wide, 2 layers",
        {10**n: replace(SMALL, conversations=10**n, length=24) for n in (3, 4, 5, 6, 7)},
        [step(0), memory(0), START, PLAN, RESIDENT],
    ),
}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """e of y = a x^e, fitted to the upper half of the points, at least two."""
    upper = upper_half(x)
    return float(np.polyfit(np.log(x[upper]), np.log(y[upper]), 1)[0])


def upper_half(x: Sequence[float]) -> slice:
    return slice(min(len(x) // 2, len(x) - 2), None)


def verdict(curve: Curve, x: Sequence[float], found: Sequence[Measured]) -> tuple[float, float, bool]:
    """The exponent of a curve, the expected one, and whether it is held."""
    is_of_flops = curve.expected == FLOPS
    expected = exponent(x, [one.flops for one in found]) if is_of_flops else float(curve.expected)
    grown = exponent(x, [curve.of(one) for one in found])
    return grown, expected, grown <= expected + TOLERANCE


def follow(name: str, axis: Axis, output: Path | None) -> bool:
    """Measure and print an axis, and draw it; whether every curve is as expected."""
    begun = time.perf_counter()
    names = [curve.name for curve in axis.curves]
    say(f"{name}: {axis.fixed}", "", f"| {axis.grows} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|")
    found = []
    for value, point in axis.points.items():
        with tempfile.TemporaryDirectory() as directory:
            found.append(measure(point, Path(directory)))
        say(f"| {value:,} | {' | '.join(shown(curve.of(found[-1])) for curve in axis.curves)} |")
    x, held = list(axis.points), True
    say("")
    for curve in axis.curves:
        grown, expected, within = verdict(curve, x, found)
        held &= within
        what = f", {FLOPS}" if curve.expected == FLOPS else ""
        over = "" if within else "   OVER"
        say(f"{curve.name}: grows with exponent {grown:.2f} (expected at most {expected:.2f}{what}){over}")
    say(f"took {time.perf_counter() - begun:,.0f} s", "")
    if output is not None:
        figures = {value: asdict(one) for value, one in zip(x, found, strict=True)}
        (output / f"{name}.json").write_text(json.dumps(figures, indent=1))
        draw(axis, x, found, output / f"{name}.png")
    return held


def draw(axis: Axis, x: Sequence[float], found: Sequence[Measured], file: Path) -> None:
    """A panel for every curve: what was measured, and from the middle on the growth that is expected."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(axis.curves), 3.6), layout="constrained")
    figure.suptitle(axis.fixed, fontsize="medium")
    for panel, curve in zip(figure.subplots(1, len(axis.curves), squeeze=False)[0], axis.curves, strict=True):
        grown, expected, _ = verdict(curve, x, found)
        y = [curve.of(one) for one in found]
        panel.loglog(x, y, "o-", color="#0072B2", label=f"measured, exponent {grown:.2f}")
        upper = x[upper_half(x)]
        line = [y[x.index(upper[0])] * (one / upper[0]) ** expected for one in upper]
        panel.loglog(upper, line, "--", color="#D55E00", label=f"expected at most {expected:.2f}")
        panel.set_ylim(min(y) / 3, max(*y, *line) * 3)
        panel.set(xlabel=axis.grows, ylabel=curve.name)
        panel.set_xticks(x, [f"{one:,}" for one in x], rotation=20)
        panel.set_xticks([], minor=True)
        panel.legend(loc="upper left", frameon=False, fontsize="small")
    figure.savefig(file, dpi=120)


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def quicker(axis: Axis) -> Axis:
    """The same at its first, middle and last point."""
    values = list(axis.points)
    return replace(
        axis, points={value: axis.points[value] for value in (values[0], values[len(values) // 2], values[-1])}
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=AXES, default=list(AXES), help="axes. Default: all")
    parser.add_argument("--quick", action="store_true", help="three points of each axis")
    parser.add_argument("--output", type=Path, help="a directory for pictures and figures")
    options = parser.parse_args(argv)
    quieten()
    if options.output is not None:
        try:
            require_matplotlib()
        except UserError as error:
            parser.error(str(error))
        options.output.mkdir(parents=True, exist_ok=True)
    held = [follow(name, quicker(AXES[name]) if options.quick else AXES[name], options.output) for name in options.only]
    return 0 if all(held) else 1


if __name__ == "__main__":
    raise SystemExit(main())
