"""Training speed and memory of this program beside its peers: same model, conversations, steps and precision.

    python benchmarks/train_throughput.py --model DIR --data TASK TASK … --peers-python peers/bin/python \
        --litgpt-python litgpt/bin/python

Peers are installed in environments of their own (``benchmarks/peers.txt``, ``benchmarks/litgpt.txt``); without their
interpreters this program is measured alone, and the table says so. Every contender trains in a process of its own and
stops before each step; all of one method and precision are let go in turns. docs/speed.md says what is compared and
what the columns mean. The exit code is 1 if a contender fails or minimises another loss.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.throughput.comparing import compare
from benchmarks.throughput.contenders import METHODS, PRECISIONS, PROGRAMS, installed
from benchmarks.throughput.preparing import prepare
from benchmarks.throughput.table import OTHER_LOSS, Row, Work, as_json, heading, line, summary
from benchmarks.throughput.workload import Workload
from mft_lightning.data.cores import available_cores
from mft_lightning.errors import UserError
from mft_lightning.quiet import quieten

FASTEST = ["packed", "packing=bfd", "Trainer, padded"]  # settings, and one that many use
ONLY = "words, of which a contender's name must have one ('' is in all of them)."


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GPT-NeoX's config.json and tokenizer")
    parser.add_argument("--data", nargs="+", required=True, help="task directories")
    parser.add_argument("--peers-python", help="the interpreter that has TRL and transformers")
    parser.add_argument("--litgpt-python", help="the interpreter that has litgpt")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["full", "lora"])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["32-true", "bf16-true"])
    parser.add_argument("--only", nargs="+", default=FASTEST, help=f"{ONLY} Default: {' '.join(map(repr, FASTEST))}")
    parser.add_argument("--conversations", type=int, default=10, help="of a step")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step")
    parser.add_argument("--seq-length", type=int, default=2048, help="most tokens of a conversation")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before those that are measured")
    parser.add_argument("--rounds", type=int, default=5, help="that are measured")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--attention", help="of everyone. Default: sdpa, on CUDA flash_attention_2")
    parser.add_argument("--work", type=Path, help="a new directory to keep what is written in, logs too")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args(argv)
    if options.conversations % options.micro_batches:
        parser.error("--conversations: is no multiple of --micro-batches")
    if options.work is not None and options.work.is_dir() and any(options.work.iterdir()):
        parser.error(f"--work: {options.work} is not empty")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    quieten()
    with tempfile.TemporaryDirectory() if options.work is None else nullcontext(options.work) as directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        workload = Workload(
            directory=str(Path(directory).absolute()),
            tasks=[str(Path(task).absolute()) for task in options.data],
            steps=options.warm_up + options.rounds + 1,
            conversations=options.conversations,
            micro_batches=options.micro_batches,
            seq_length=options.seq_length,
            device=options.device,
            attention=options.attention or ("sdpa" if options.device == "cpu" else "flash_attention_2"),
        )
        try:
            return measure(options, workload, prepare(workload, options.model, options.method, options.warm_up))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1


def measure(options: argparse.Namespace, workload: Workload, works: dict[str, Work]) -> int:
    """Measure and print; the exit code."""
    begun = time.perf_counter()
    given = {"": sys.executable, "--peers-python": options.peers_python, "--litgpt-python": options.litgpt_python}
    pythons = {name: given[program.python] for name, program in PROGRAMS.items()}
    versions = {name: installed(python, PROGRAMS[name].needs) for name, python in pythons.items() if python is not None}
    say(
        f"{options.device}, {options.threads} threads, {workload.attention} attention, "
        f"{workload.micro_batches} micro-batch{'es' if workload.micro_batches > 1 else ''} a step"
    )
    for name, found in versions.items():
        say(f"{name}: {', '.join(f'{module} {version}' for module, version in found.items())}")
    work = next(iter(works.values()))
    tokens, supervised = (sum(counts) / len(counts) for counts in (work.tokens, work.supervised))
    say(
        f"a step: {workload.conversations} conversations, {tokens:,.0f} tokens, {supervised:,.0f} of them supervised",
        "",
    )
    rows: list[Row] = []

    def tell(row: Row) -> None:
        rows.append(row)
        say(line(row))

    say(heading())
    for method, work in works.items():
        compare(
            method,
            options.precision,
            options.only,
            pythons,
            workload,
            work,
            warm_up=options.warm_up,
            threads=options.threads,
            tell=tell,
        )
    say("", *summary(rows), "")
    say(f"all of it took {time.perf_counter() - begun:,.0f} s")
    if options.json is not None:
        options.json.write_text(json.dumps({**as_json(rows), "versions": versions}, indent=1))
    return int(any(row.note.startswith(("failed", OTHER_LOSS)) for row in rows))


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
