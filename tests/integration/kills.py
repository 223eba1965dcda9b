"""Kills runs by SIGKILL again and again, and tells whether what they end with is the same to the bit.

    python tests/integration/kills.py --kills 200 [--seed 0] [--only NAME] [--directory DIR]

Each case (``kill_cases.py``) runs once as a whole. Then it runs in parts: every part but the last is killed at a place
drawn by the seed, and the next goes on with ``--ckpt_path last``. The two must not differ in anything that stays of a
run (``same_run.py``). The exit code is 1 if one does.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; forks want no pools
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # nor pyarrow's thread
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mft_lightning.commands.fit  # noqa: F401  # what each part would have to import
from mft_lightning.training.checkpoint_choice import find_checkpoints
from tests.integration.forked import FailedError, run_forked
from tests.integration.fuse import Hook
from tests.integration.kill_cases import CASES, STEPS, Case, fit_words, prepare
from tests.integration.same_run import differences

PLACES = ("start", "step", "validation", "save", "epoch", "end")
SHOWN = 40  # differences of a case
LAST_SAVE = 0.4  # how often the last kill of a run is one near its last save


@dataclass(frozen=True)
class Kind:
    """A kind of kill.

    Attributes:
        hooks: where its fuse may be lit.
        delay: seconds that it burns at most.
        after: whether it is lit after a step at the earliest, not before it.
        often: how often it is drawn.
    """

    hooks: tuple[Hook, ...]
    delay: float
    after: bool
    often: float


KINDS = {
    "step": Kind(("train_batch_start",), 0.06, False, 2),
    "validation": Kind(("validation_batch_start",), 0.03, True, 3),
    "save": Kind(("save_checkpoint",), 0.15, True, 3),
    "epoch": Kind(("train_epoch_end", "train_epoch_start"), 0.01, True, 3),
    "start": Kind(("setup",), 0.5, False, 0.5),
}


@dataclass(frozen=True)
class Kill:
    """Where one kill shall be: the arguments of a :class:`Fuse`."""

    hook: Hook
    step: int
    delay: float
    rank: int

    def words(self, note: Path) -> list[str]:
        arguments = {"hook": self.hook, "step": self.step, "delay": f"{self.delay:.4f}", "rank": self.rank}
        words = ["--trainer.callbacks+=tests.integration.fuse.Fuse", f"--trainer.callbacks.note={note}"]
        return [*words, *(f"--trainer.callbacks.{name}={value}" for name, value in arguments.items())]


def draw_kill(chance: random.Random, done: int, left: int, ranks: int) -> Kill:
    """Draw the next kill of a run, so that there are steps left for those after it.

    Args:
        chance: draws.
        done: the step of the newest checkpoint, which the part starts from.
        left: kills to come, this one among them.
        ranks: of the run.
    """
    rank, room = chance.randrange(ranks), STEPS - done
    if left == 1 and done > 0 and chance.random() < LAST_SAVE:
        return Kill("save_checkpoint", STEPS, chance.uniform(0, 2 * KINDS["save"].delay), rank)
    near_the_end = left > 1 and room <= 3  # what comes after a step may be the end of the run
    kinds = [kind for kind in KINDS.values() if not (near_the_end and kind.after)]
    (kind,) = chance.choices(kinds, [kind.often for kind in kinds])
    ahead = 0 if near_the_end else chance.randint(0, min(room // 2, math.ceil(2 * room / left)))
    step = 0 if kind.hooks == ("setup",) else done + ahead + kind.after
    return Kill(chance.choice(kind.hooks), step, chance.uniform(0, kind.delay), rank)


@dataclass
class Result:
    """What became of a case.

    Attributes:
        case: which.
        places: kills by where they fell.
        parts: that its killed runs had.
        repeated: steps that were taken again.
        seconds: all of it took.
        found: differences, and parts that failed.
    """

    case: Case
    places: Counter[str] = field(default_factory=Counter)
    parts: int = 0
    repeated: int = 0
    seconds: float = 0.0
    found: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.places.total()

    @property
    def cells(self) -> list[str]:
        counts = [self.places[place] for place in PLACES]
        numbers = [self.kills, *counts, self.parts, self.repeated, round(self.seconds)]
        return [self.case.name, *map(str, numbers), "no" if self.found else "yes"]


class Laboratory:
    """Runs cases below a directory.

    Args:
        directory: with what :func:`prepare` has put there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.variables = {"XDG_CACHE_HOME": str(directory / "cache")}

    def run(self, case: Case, kills: int, chance: random.Random) -> Result:
        """The whole run, and as many killed ones as it takes to have so many kills; each must end as the whole."""
        result, start = Result(case), time.monotonic()
        whole = self.directory / case.name / "whole"
        whole.parent.mkdir()
        try:
            if run_forked(fit_words(case, self.directory, whole), case.ranks, self._log(whole), self.variables):
                raise FailedError("was killed from outside")
            while result.kills < kills:
                self._run_in_parts(result, kills, chance)
        except FailedError as error:
            result.found.append(f"a part {error}")
        result.found += self.compare(case)
        result.seconds = time.monotonic() - start
        return result

    def compare(self, case: Case) -> list[str]:
        """How the killed runs of a case differ from the whole one."""
        directory, found = self.directory / case.name, []
        for killed in sorted(directory.glob("killed-?")):
            found += [f"{killed.name}/{line}" for line in differences(directory / "whole", killed)]
        return found

    def _run_in_parts(self, result: Result, kills: int, chance: random.Random) -> None:
        case, before = result.case, result.kills
        number = len(list((self.directory / case.name).glob("killed-?"))) + 1
        run = self.directory / case.name / f"killed-{number}"
        log, note = self._log(run), run.with_suffix(".note")
        words = [*fit_words(case, self.directory, run), "--ckpt_path", "last"]
        killed, done = True, 0
        while killed:
            result.parts += 1
            fuse = []
            if done < STEPS and result.kills < kills:
                fuse = draw_kill(chance, done, kills - result.kills, case.ranks).words(note)
            note.unlink(missing_ok=True)
            killed = run_forked([*words, *fuse], case.ranks, log, self.variables)
            if killed:
                if not note.exists():
                    raise FailedError("was killed from outside")
                place, _, step = note.read_text().partition(" ")
                result.places[place] += 1
                checkpoints = find_checkpoints(run)
                done = checkpoints[-1].step if checkpoints else 0
                result.repeated += max(0, int(step) - done)  # before it has loaded anything, a part is at step 0
        if result.kills == before:
            raise FailedError("was not killed, though it had a fuse")

    def _log(self, run: Path) -> Path:
        return run.with_suffix(".log")


def table(results: list[Result]) -> str:
    """A line for each case and one for all of them."""
    head = ["case", "kills", *PLACES, "parts", "steps repeated", "seconds", "identical"]
    rows = [head, *(result.cells for result in results)]
    sums = [str(sum(int(row[column]) for row in rows[1:])) for column in range(1, len(head) - 1)]
    rows.append(["all", *sums, "no" if any(result.found for result in results) else "yes"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for first, *rest in rows:
        numbers = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *numbers]))
    return "\n".join(lines)


def main() -> int:
    """Run what the command line asks for; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="of all cases; 0 compares what is in --directory again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=[case.name for case in CASES], help="a case; repeatable")
    parser.add_argument("--directory", type=Path, help="a new one, which is kept")
    arguments = parser.parse_args()
    if arguments.kills and arguments.directory and arguments.directory.exists():
        parser.error(f"{arguments.directory} is there already")
    cases = [case for case in CASES if arguments.only is None or case.name in arguments.only]
    directory = (arguments.directory or Path(tempfile.mkdtemp(prefix="kills-"))).absolute()
    laboratory, results = Laboratory(directory), []
    if arguments.kills == 0:
        results = [Result(case, found=laboratory.compare(case)) for case in cases]
    else:
        prepare(directory)
        gc.freeze()
        for number, case in enumerate(cases):
            share = arguments.kills // len(cases) + (number < arguments.kills % len(cases))
            results.append(laboratory.run(case, share, random.Random(f"{arguments.seed} {case.name}")))
            print(f"{case.name}: {results[-1].kills} kills in {results[-1].seconds:.0f} s", flush=True)
    for result in results:
        for line in result.found[:SHOWN]:
            print(f"{result.case.name}: {line}")
        if (more := len(result.found) - SHOWN) > 0:
            print(f"{result.case.name}: {more} more differences")
    print(table(results))
    differ = any(result.found for result in results)
    if arguments.directory is None and not differ:
        shutil.rmtree(directory)
    elif differ:
        print(f"the runs are in {directory}")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
