"""The contenders of one method and precision after those of another, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.throughput.contenders import OURS, Contender, contenders, left_out
from benchmarks.throughput.table import Row, Work, make_row
from benchmarks.throughput.turns import take_turns
from benchmarks.throughput.workload import Workload
from mft_lightning.errors import UserError

EXACT = "32-true"  # the precision whose losses the others' are compared with


def compare(
    method: str,
    precisions: list[str],
    only: list[str],
    pythons: Mapping[str, str | None],
    workload: Workload,
    work: Work,
    *,
    warm_up: int,
    threads: int,
    tell: Callable[[Row], None],
) -> dict[str, list[float]]:
    """Measure all contenders of a method, those of one precision in turns.

    Args:
        method: with which they train.
        precisions: at which.
        only: words, of which a contender's name must have one; none for all.
        pythons: the interpreter of each program.
        workload: what they do.
        work: what the measured steps hold.
        warm_up: rounds that are not measured.
        threads: of each contender.
        tell: is given every row as soon as there is one.

    Returns:
        Operations a second of matrix products before each round, by precision.

    Raises:
        UserError: this program fails where the others' losses are compared with its own.
    """
    speeds: dict[str, list[float]] = {}
    reference: list[float] | None = None
    for precision in sorted(precisions, key=lambda precision: precision != EXACT):
        chosen, reasons = _present(contenders(method, precision, only), pythons)
        for contender, reason in reasons.items():
            tell(Row(name=contender.name, method=method, precision=precision, note=f"left out: {reason}"))
        if not chosen:
            continue
        available = {program: python for program, python in pythons.items() if python is not None}
        rounds = {"warm_up": warm_up, "rounds": len(work.tokens), "threads": threads}
        results, speeds[precision] = take_turns(chosen, available, workload, **rounds)
        ours = next((result for result in results if result.contender.program == OURS), None)
        if reference is None:
            exact = ours
            if exact is None or precision != EXACT:
                (exact,), _ = take_turns([Contender(OURS, "packed", method, EXACT)], available, workload, **rounds)
            if exact.failed is not None:
                raise UserError(
                    f"this program failed with {method} in {EXACT}, so there is no loss to compare with: {exact.failed}"
                )
            reference = exact.losses
        for result in results:
            tell(make_row(result, ours, work, speeds[precision], reference))
    return speeds


def _present(
    chosen: list[Contender], pythons: Mapping[str, str | None]
) -> tuple[list[Contender], dict[Contender, str]]:
    """The contenders that can take part, and why others cannot."""
    reasons = {contender: left_out(contender, pythons[contender.program]) for contender in chosen}
    present = [contender for contender, reason in reasons.items() if reason is None]
    return present, {contender: reason for contender, reason in reasons.items() if reason is not None}
