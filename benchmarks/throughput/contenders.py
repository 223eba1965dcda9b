"""Who takes part: programs, the settings each is tried in, and what their environments must have."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from functools import cache

from benchmarks.throughput import ours
from benchmarks.throughput.workload import Workload

METHODS = ("full", "lora", "qlora")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
OURS = "this program"


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program and the environment it runs in.

    Attributes:
        module: that runs it, of this package.
        settings: its ways to lay out a batch.
        python: the option that names its interpreter.
        needs: modules that must be there.
        methods: that it can train with.
        same_adapters: whether its adapters are those of the others.
    """

    module: str
    settings: tuple[str, ...]
    python: str
    needs: tuple[str, ...]
    methods: tuple[str, ...] = METHODS
    same_adapters: bool = True


PROGRAMS = {
    OURS: Program(module="ours", settings=tuple(ours.SETTINGS), python="", needs=("torch", "transformers", "peft")),
    "Trainer": Program(
        module="hf_trainer",
        settings=("packed", "padded"),
        python="--peers-python",
        needs=("torch", "transformers", "peft", "accelerate"),
    ),
    "TRL": Program(
        module="trl_sft",
        settings=("packing=bfd", "padding_free", "padded"),
        python="--peers-python",
        needs=("torch", "transformers", "peft", "accelerate", "datasets", "trl"),
    ),
    "litgpt": Program(
        module="litgpt_finetune",
        settings=("padded",),
        python="--litgpt-python",
        needs=("torch", "lightning", "litgpt"),
        methods=("full", "lora"),
        same_adapters=False,
    ),
}


@dataclass(frozen=True)
class Contender:
    """A program in one of its settings, training with one method at one precision."""

    program: str
    setting: str
    method: str
    precision: str

    @property
    def name(self) -> str:
        return f"{self.program}, {self.setting}"

    @property
    def same_adapters(self) -> bool:
        return self.method == "full" or PROGRAMS[self.program].same_adapters

    def words(self, workload: Workload) -> list[str]:
        """What its Python is given."""
        if self.program == OURS:
            return ours.words(workload, self.setting, self.method, self.precision)
        module = f"benchmarks.throughput.{PROGRAMS[self.program].module}"
        return ["-m", module, workload.directory, self.setting, self.method, self.precision]


def contenders(method: str, precision: str, only: list[str]) -> list[Contender]:
    """Those of one method and precision whose name has one of the words ``only``, if there are any."""
    found = [
        Contender(program, setting, method, precision)
        for program, about in PROGRAMS.items()
        for setting in about.settings
    ]
    return [contender for contender in found if not only or any(word in contender.name for word in only)]


def left_out(name: str, method: str, python: str | None) -> str | None:
    """Why a program cannot take part with a method, if it cannot."""
    program = PROGRAMS[name]
    if method not in program.methods:
        return f"does not train with {method} here"
    if python is None:
        return f"no {program.python} was given"
    needs = (*program.needs, "bitsandbytes") if method == "qlora" else program.needs
    versions = installed(python, needs)
    if missing := [name for name, version in versions.items() if version is None]:
        return f"{', '.join(missing)} cannot be imported by {program.python or 'this Python'}"
    return None


@cache
def installed(python: str, names: tuple[str, ...]) -> dict[str, str | None]:
    """The versions of modules that an interpreter has, None where one is not there."""
    code = (
        "import json, sys\n"
        "from importlib import metadata, util\n"
        "print(json.dumps({n: metadata.version(n) if util.find_spec(n) else None for n in sys.argv[1:]}))"
    )
    try:
        done = subprocess.run([python, "-c", code, *names], stdout=subprocess.PIPE, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return dict.fromkeys(names)
    return json.loads(done.stdout)
