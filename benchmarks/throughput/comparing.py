"""The contenders of one method and precision after those of another, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.throughput.contenders import OURS, Contender, contenders, left_out
from benchmarks.throughput.table import Row, Work, make_row
from benchmarks.throughput.turns import Measured, take_turns
from benchmarks.throughput.workload import Workload
from mft_lightning.errors import UserError

EXACT = "32-true"  # the precision in which this program's losses are what the others' are compared with
EXACT_OURS = (OURS, EXACT)


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
) -> None:
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

    Raises:
        UserError: this program fails where the others' losses are compared with its own.
    """
    available = {program: python for program, python in pythons.items() if python is not None}
    rounds = {"warm_up": warm_up, "rounds": len(work.tokens), "threads": threads}
    absent = _absent(method, only, pythons, tell)
    reference = None
    for precision in sorted(precisions, key=lambda precision: precision != EXACT):
        chosen = [other for other in contenders(method, precision, only) if other.program not in absent]
        if not chosen:
            break
        if reference is None and EXACT_OURS not in ((other.program, other.precision) for other in chosen):
            (exact,) = take_turns([Contender(OURS, "packed", method, EXACT)], available, workload, **rounds)
            reference = _losses(exact)
        results = take_turns(chosen, available, workload, **rounds)
        ours = next((result for result in results if result.contender.program == OURS), None)
        if reference is None:
            assert ours is not None
            reference = _losses(ours)
        for result in results:
            tell(make_row(result, ours, work, reference))


def _losses(exact: Measured) -> list[float]:
    """Those that others are compared with."""
    if exact.failed is not None:
        contender = exact.contender
        raise UserError(
            f"{contender.name} failed with {contender.method} in {contender.precision}, so that there is no loss to "
            f"compare others' with: {exact.failed}"
        )
    return exact.losses


def _absent(method: str, only: list[str], pythons: Mapping[str, str | None], tell: Callable[[Row], None]) -> set[str]:
    """The programs that cannot take part; why is told of each of their settings."""
    reasons = {program: left_out(program, method, python) for program, python in pythons.items()}
    for contender in contenders(method, EXACT, only):
        if (reason := reasons[contender.program]) is not None:
            tell(Row(name=contender.name, method=method, precision="", note=f"left out: {reason}"))
    return {program for program, reason in reasons.items() if reason is not None}
