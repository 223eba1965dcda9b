"""What was measured as rows of figures, a table of them, and a summary of ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.throughput.contenders import OURS
from benchmarks.throughput.losses import is_other_loss, loss_off
from benchmarks.throughput.turns import Measured

MIB = 2**20
OTHER_LOSS = "other loss"


@dataclass(frozen=True)
class Work:
    """What the measured steps hold, step by step."""

    tokens: list[int]
    supervised: list[int]
    flops: list[int]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Figures of one contender; medians over the measured rounds, None where there is none.

    Attributes:
        name: of the contender.
        method: with which it trains.
        precision: at which; empty where none of them was tried.
        note: why there are no figures, or why they do not count.
        seconds: of a step.
        tokens: a second, no padding counted.
        supervised: of them.
        gflops: useful ones, a second.
        gemm_gflops: a second, of matrix products before its steps.
        gemm_share: of their speed, 0 to 1.
        peak_mib: memory in use at most.
        slower: its seconds by those of this program's first setting in the same round.
        memory: its peak by that of this program's first setting.
        loss_off: from this program's in float32.
    """

    name: str
    method: str
    precision: str
    note: str = ""
    seconds: float | None = None
    tokens: float | None = None
    supervised: float | None = None
    gflops: float | None = None
    gemm_gflops: float | None = None
    gemm_share: float | None = None
    peak_mib: float | None = None
    slower: float | None = None
    memory: float | None = None
    loss_off: float | None = None

    @property
    def counts(self) -> bool:
        return self.seconds is not None and not self.note


def make_row(measured: Measured, ours: Measured | None, work: Work, reference: list[float]) -> Row:
    """The figures of a contender.

    Args:
        measured: its steps.
        ours: those that it is compared with.
        work: of the measured steps.
        reference: this program's losses in float32, of every step.
    """
    contender = measured.contender
    of = {"name": contender.name, "method": contender.method, "precision": contender.precision}
    if measured.failed is not None:
        return Row(**of, note=f"failed: {measured.failed}")
    per_second = [flops / seconds for flops, seconds in zip(work.flops, measured.seconds, strict=True)]
    compared = ours is not None and ours.failed is None
    return Row(
        **of,
        note=OTHER_LOSS if is_other_loss(measured, reference) else "",
        seconds=statistics.median(measured.seconds),
        tokens=_rate(work.tokens, measured.seconds),
        supervised=_rate(work.supervised, measured.seconds),
        gflops=statistics.median(per_second) / 1e9,
        gemm_gflops=statistics.median(measured.gemm) / 1e9,
        gemm_share=statistics.median(_over(per_second, measured.gemm)),
        peak_mib=measured.peak / MIB,
        slower=statistics.median(_over(measured.seconds, ours.seconds)) if ours and compared else None,
        memory=measured.peak / ours.peak if ours and compared else None,
        loss_off=loss_off(measured, reference),
    )


def _over(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [value / other for value, other in zip(values, others, strict=True)]


def _rate(counts: Sequence[float], seconds: Sequence[float]) -> float:
    return statistics.median(_over(counts, seconds))


COLUMNS = (
    "contender | method | precision | s a step | tokens/s | supervised/s | GFLOP/s | GEMM | share of it | peak MiB "
    "| time / ours | memory / ours | loss off"
)


def heading() -> str:
    return f"| {COLUMNS} |\n|{'---|' * (COLUMNS.count('|') + 1)}"


def line(row: Row) -> str:
    """A row of the table."""
    begin = f"| {row.name} | {row.method} | {row.precision} |"
    if row.seconds is None:
        return f"{begin} {row.note} |{' |' * 9}"
    figures = [
        f"{row.seconds:.2f}",
        f"{row.tokens:,.0f}",
        f"{row.supervised:,.0f}",
        f"{row.gflops:,.0f}",
        f"{row.gemm_gflops:,.0f}",
        f"{row.gemm_share:.0%}",
        f"{row.peak_mib:,.0f}",
        _times(row.slower),
        _times(row.memory),
        f"{row.loss_off:.0e}{' ' if row.note else ''}{row.note}",
    ]
    return " | ".join([begin[:-2], *figures]) + " |"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


GROUPS = {  # of contenders, by the beginning of their names
    "TRL": "TRL's fastest",
    "Trainer, packed": "Trainer, packed",
    "Trainer, padded": "Trainer, padded",
    "litgpt": "litgpt",
}


def summary(rows: Sequence[Row]) -> list[str]:
    """How many times as fast this program is as others, and its memory as a share of theirs.

    A line for each method and precision, and one for each method with everyone at the fastest precision. Rows with
    another loss do not count.
    """
    present = {
        beginning: name for beginning, name in GROUPS.items() if any(row.name.startswith(beginning) for row in rows)
    }
    lines = [f"| times as fast, share of the memory | {' | '.join(present.values())} | of GEMM |"]
    lines += [f"|{'---|' * (len(present) + 2)}"]
    for method in dict.fromkeys(row.method for row in rows):
        of_method = [row for row in rows if row.method == method and row.counts]
        for precision in dict.fromkeys(row.precision for row in of_method):
            same = [row for row in of_method if row.precision == precision]
            lines += _compared(f"{method}, {precision}", same, list(present))
        if len({row.precision for row in of_method}) > 1:
            lines += _compared(f"{method}, each at its fastest", of_method, list(present))
    return lines


def _compared(what: str, rows: Sequence[Row], beginnings: Sequence[str]) -> list[str]:
    ours = _fastest(rows, OURS)
    if ours is None:
        return []
    cells = [f"{what}: {_short(ours, rows)}"]
    for beginning in beginnings:
        best = _fastest(rows, beginning)
        if best is None:
            cells.append("")
        else:
            assert ours.peak_mib is not None and best.peak_mib is not None
            share = ours.peak_mib / best.peak_mib
            cells.append(f"{_times_as_fast(ours, best):.2f}, {share:.0%} ({_short(best, rows)})")
    return [f"| {' | '.join(cells)} | {ours.gemm_share:.0%} |"]


def _times_as_fast(ours: Row, other: Row) -> float:
    """By the same rounds where they took turns, else by the medians."""
    if ours.precision == other.precision and ours.slower is not None and other.slower is not None:
        return other.slower / ours.slower
    assert ours.tokens is not None and other.tokens is not None
    return ours.tokens / other.tokens


def _short(row: Row, rows: Sequence[Row]) -> str:
    setting = row.name.partition(", ")[2]
    return setting if len({row.precision for row in rows}) == 1 else f"{setting}, {row.precision}"


def _fastest(rows: Sequence[Row], beginning: str) -> Row | None:
    found = [row for row in rows if row.name.startswith(beginning)]
    return max(found, key=lambda row: row.tokens or 0.0, default=None)


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    return {"rows": [asdict(row) for row in rows]}
