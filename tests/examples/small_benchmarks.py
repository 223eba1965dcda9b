"""The benchmarks that pages show, started with tiny settings: that they run, not what they measure."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.integration import preloaded

STEPS = "--data {task} --steps 1 --threads 1 -- --data.num_workers 0 --data.seq_length 256"
# What is added to the command of the page, the last word of an option counting -> what is printed at the end.
SMALL = {
    "balancer_cost": ("--steps 2", "coba "),
    "balancing": ("--steps 1 --seeds 1 --modes case3 --output {new}", "| case3 |"),
    "checkpoint": ("--model {model} --tasks {task} --steps 7 --every 3 --rank 2", "lora "),
    "compiled_layers": (STEPS, "first compiled step "),
    "head_loss": ("--tokens 8 --hidden 16 --vocabulary 64 --rows 4 --conversations 2 --repeats 1", "lce one "),
    "launch": ("--repeats 1", "  first forward begins "),
    "lora_start": ("--widths 128 --layers 1", "| 128 | 1 | use_dora |"),
    "merging_memory": ("--hidden 64 --layers 1 --vocabulary 512 --rank 2", "peft   rises by"),
    "plan": ("--conversations 2000", "tasks at temperature 2"),
    "quantized": ("--layers 1", "| nf4, double quantised |"),
    "quickstart_shuffled": ("--trainer.max_steps 1 --evaluation.exact_match_per_task null", "mean over tasks"),
    "saving_memory": ("--hidden 64 --layers 1 --vocabulary 512 --ranks 1 --forms sharded", "sharded "),
    "scaling": ("--layouts one --hidden 64 --layers 1 --conversations 1 --steps 1 --rounds 1", ""),
    "sharded_start": ("--hidden 64 --layers 1 --vocabulary 512 --ranks 1 --kinds pretrained", "pretrained "),
    "shared_head": ("--hidden 8 --vocabulary 32 --tokens 8 --repeats 1", "| frozen | 8 |"),
    "step_budget": (STEPS, "a step "),
    "tokenise": ("--mib 1 --repeats 1 --cores 1", "ours / library: "),
}


def run_small(module: str, words: list[str], model: Path, new: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Start a benchmark by the words of a page.

    Args:
        module: its name.
        words: its arguments there.
        model: a directory with a narrow model's configuration and a tokenizer.
        new: a directory that is not there.
        capfd: what is printed.
    """
    task = ROOT / "examples" / "quickstart" / "unit_tests"
    here = {"MODEL": str(model), "DIR": str(model)}
    more, printed = SMALL[module]
    given = [*(here.get(word, word) for word in words), *more.format(model=model, task=task, new=new).split()]
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))  # as that of a script's own directory
        patch.setattr("sys.argv", [module, *given])
        patch.setattr(subprocess, "run", _run)
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # its compiler takes half a minute
        importlib.import_module(f"benchmarks.{module}").main()
    assert printed in capfd.readouterr().out, shlex.join([module, *given])


def _run(words: list[str], env: Any = None, **given: Any) -> subprocess.CompletedProcess[str]:
    """A process of Python's with everything imported, which saves most of the time."""
    assert words[0] == sys.executable
    done = preloaded.run(words[1:], env or {**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    if given.get("stdout") is None and not given.get("capture_output"):
        print(done.stdout)
    return done


class Parsed(Exception):
    """A benchmark has read its command line."""


def is_parsed(module: str, words: list[str]) -> None:
    """That a benchmark takes the words of a page; it is not started."""
    read = argparse.ArgumentParser.parse_known_args  # which parse_args calls too

    def end(parser: argparse.ArgumentParser, *given: Any) -> None:
        _, unknown = read(parser, words)
        assert not unknown
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setattr(argparse.ArgumentParser, "parse_known_args", end)
        importlib.import_module(f"benchmarks.{module}").main()
