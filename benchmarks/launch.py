"""How long from launching ``fit`` until its first forward begins, where that goes, and how much of it nobody can avoid?

    python benchmarks/launch.py
    python benchmarks/launch.py --config configs/lora.yaml --data.data_paths "[data/arithmetic]"

Words that are no option here are handed on to ``fit``, on one device. Data that was prepared before leaves tokenising
out of account; ``--evaluation.strategy none`` makes the first forward the first micro-batch's, where it would be that
of the validation before. Beside it stands what it takes to import torch, lightning and transformers alone, with
Python's garbage collections and without, in turns with the launches, as a busy machine slows all. Seconds are medians;
the exit code is 1 if a first forward begins after the limit.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 10.0
MARK = "REACHED"
STAGED = "--staged"  # run fit, and tell when its stages end
FIRST_FORWARD = "first forward begins"
HELP = "import sys, launch; from mft_lightning.cli import main; main(['--help']); launch.tell('its help')"
IMPORTS = "import lightning, torch, transformers, launch; launch.tell('imported')"
PROGRAMS = {
    "python -m mft_lightning --help": HELP,
    "torch, lightning, transformers imported": IMPORTS,
    "the same without garbage collections": f"import gc; gc.disable(); {IMPORTS}",
}


def tell(stage: str) -> None:
    """That the launched program is at the end of a stage, the time, and its CPU seconds so far."""
    print(MARK, stage, time.time(), sum(os.times()[:2]), sep="\t", flush=True)


def staged_fit(words: list[str]) -> NoReturn:
    """``fit`` as the command line runs it, which tells of the end of each stage and ends where a forward begins."""
    from mft_lightning import cli

    fit = cli._imported(cli.COMMANDS["fit"][0].partition(":")[0])
    tell("imports")
    from mft_lightning.data.datamodule import MFTDataModule
    from mft_lightning.model.module import MFTModule
    from mft_lightning.model.supervised_loss import SupervisedLM

    stages: list[tuple[Any, str, str]] = [
        (fit, "RunConfig", "keys, tokenizer"),
        (MFTModule, "check", "checks"),
        (MFTDataModule, "setup", "data"),
        (MFTModule, "build", "model"),
        (fit, "fit_trainer", "trainer"),
    ]
    for owner, name, stage in stages:
        setattr(owner, name, _telling(stage, getattr(owner, name)))
    SupervisedLM.forward = _tell_and_end  # type: ignore[method-assign]
    raise SystemExit(cli.main(["fit", *words]))


def _telling(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        result = function(*given, **named)
        tell(stage)
        return result

    return call


def _tell_and_end(*given: Any) -> NoReturn:
    tell(FIRST_FORWARD)
    os._exit(0)


def launched(words: list[str]) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds from the launch of Python with ``words`` until the end of each stage, in their order."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    start = time.time()
    run = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    found: dict[str, tuple[float, float]] = {}
    for line in run.stdout.splitlines():
        if line.startswith(MARK):
            _, stage, at, cpu = line.split("\t")
            found.setdefault(stage, (float(at) - start, float(cpu)))  # Lightning asks again for what is there
    if run.returncode or not found:
        raise SystemExit(run.stdout + run.stderr + "benchmark: no forward began.")
    return found


def main() -> int:
    """Launch in turns, print a table, and compare with the limit; the exit code."""
    if STAGED in sys.argv[1:2]:
        staged_fit(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"))
    parser.add_argument("--repeats", type=int, default=5)
    options, handed_on = parser.parse_known_args()
    fit = [__file__, STAGED, "--config", options.config, *handed_on, "--output_dir"]
    alone: dict[str, list[tuple[float, float]]] = defaultdict(list)
    stages: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(options.repeats):
        for name, program in PROGRAMS.items():
            alone[name] += launched(["-c", program]).values()
        with tempfile.TemporaryDirectory() as directory:
            for stage, reached in launched([*fit, str(Path(directory) / "run")]).items():
                stages[stage].append(reached)
    print(f"{'':42} {'wall s':>7} {'CPU s':>7} {'of it':>7}")
    for name, found in alone.items():
        _print(name, *_medians(found))
    print("fit")
    wall = 0.0
    for stage, found in stages.items():
        before, (wall, cpu) = wall, _medians(found)
        _print(f"  {stage}", wall, cpu, f"{wall - before:7.2f}")
    print(f"{'limit':42} {LIMIT:7.2f}")
    return int(wall > LIMIT)


def _medians(found: list[tuple[float, float]]) -> tuple[float, float]:
    walls, cpus = zip(*found, strict=True)
    return statistics.median(walls), statistics.median(cpus)


def _print(name: str, wall: float, cpu: float, share: str = "") -> None:
    print(f"{name:42} {wall:7.2f} {cpu:7.2f} {share}")


if __name__ == "__main__":
    raise SystemExit(main())
