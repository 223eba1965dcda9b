"""Commands of the pages that another test runs: which, and that it does hold the command's words."""

from __future__ import annotations

import ast
import re
from functools import cache

from tests.conftest import ROOT
from tests.examples.test_readme import blocks

TESTS = "tests/integration"
README_TEST = "tests/examples/test_readme.py::test_every_command_of_the_readme"
# What needs several processes, a cluster, or minutes -> the test that runs it, and what it has of the command.
ELSEWHERE: dict[str, tuple[str, tuple[str, ...]]] = {
    r"torchrun --standalone .* --config configs/fsdp\.yaml$": (
        README_TEST,
        ("torchrun --standalone --nproc-per-node 2 -m mft_lightning fit --config fsdp.yaml",),
    ),
    r"torchrun --max-restarts 3 … --ckpt_path last$": (
        f"{TESTS}/test_ranks.py::test_torchrun_starts_ranks_again_and_they_go_on",
        ("torch.distributed.run", "--max-restarts", "--ckpt_path", "last"),
    ),
    r"torchrun --nnodes 2 .* --config configs/multi-node\.yaml$": (
        f"{TESTS}/test_hosts.py::test_a_host_is_lost_and_the_run_goes_on_to_the_same_weights",
        ("torch.distributed.run", "--nnodes", "--nproc-per-node", "--rdzv-backend", "c10d", "multi-node.yaml"),
    ),
    r"srun --kill-on-bad-exit=1 .* --config configs/multi-node\.yaml$": (
        f"{TESTS}/test_slurm.py::test_bad_input_is_told_once_and_ends_the_tasks_of_both_nodes",
        ("sbatch", "parallel.md", "multi-node.yaml"),
    ),
    r"srun .* --config configs/lora\.yaml --ckpt_path last$": (
        f"{TESTS}/test_slurm.py::test_a_signal_ends_the_tasks_of_two_nodes_in_order_and_the_run_goes_on",
        ("sbatch", "srun", "lora.yaml", "--ckpt_path", "last"),
    ),
    r"python -m mft_lightning consolidate ": (
        f"{TESTS}/test_sharded_checkpoints.py::test_they_resume_in_every_layout_and_make_the_same_model",
        ('"consolidate"', '"--checkpoint"', '"--output"'),
    ),
    r"python -m mft_lightning merge .* --merge-into quantized-base$": (
        f"{TESTS}/test_merge_qlora.py::test_it_merges_into_either_base_and_measures_the_difference",
        ('"merge"', '"--adapter"', '"--output"', '"--merge-into"', '"quantized-base"'),
    ),
    r"python -m mft_lightning fit --config configs/ddp\.yaml$": (README_TEST, ("fit --config ddp.yaml",)),
    r"python -m mft_lightning fit --config configs/fsdp\.yaml$": (
        f"{TESTS}/test_ranks.py::test_it_starts_the_ranks_of_a_sharded_run",
        ("OWN", '"fit"', "fsdp.yaml"),
    ),
    r"python -m mft_lightning fit --config configs/quickstart\.yaml$": (
        README_TEST,
        ("python -m mft_lightning fit --config configs/quickstart.yaml",),
    ),
    r"python -m mft_lightning fit --config full\.yaml --config own\.yaml$": (
        f"{TESTS}/test_own_classes.py::test_one_of_each_as_documented",
        ('"--config"', '"own.yaml"', "own_classes.md"),
    ),
    r"tensorboard --": (README_TEST, ("tensorboard --logdir",)),
    r"python tests/integration/kills\.py --kills ": (
        f"{TESTS}/test_kills.py::test_killed_runs_end_as_one_that_never_was",
        ("tests/integration/kills.py", '"--kills"'),
    ),
    r"python benchmarks/growth\.py ": ("tests/test_growth.py::test_an_axis", ("growth.follow(",)),
    r"python benchmarks/memory\.py$": (
        f"{TESTS}/test_memory.py::test_the_peak_is_within_a_tenth_of_the_estimate",
        ("compare(",),
    ),
    r"python benchmarks/train_throughput\.py ": (
        "tests/test_throughput_suite.py::test_losses_are_those_of_transformers_trainer",
        ("train_throughput.main", '"--model"', '"--data"', '"--peers-python"'),
    ),
}


def run_elsewhere(line: str) -> bool:
    """Whether another test runs a command; that test must be there, and hold its words."""
    found = next((test for pattern, test in ELSEWHERE.items() if re.match(pattern, line)), None)
    if found is not None:
        source = _source(found[0])
        missing = [word for word in found[1] if word not in source]
        assert not missing, f"{found[0]}, which is said to run {line}, has no {missing}"
    return found is not None


@cache
def _source(test: str) -> str:
    """A test, and what it uses of its file: fixtures, functions, constants; the README's test has its commands."""
    file, name = test.split("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    parts: dict[str, ast.stmt] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts[node.name] = node
        elif isinstance(node, ast.Assign):
            parts |= {one.id: node for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name)}
    assert name in parts, f"{file} has no {name}"
    waiting, used = [name], set()
    while waiting:
        used.add(one := waiting.pop())
        names = {node.id for node in ast.walk(parts[one]) if isinstance(node, ast.Name)}
        names |= {node.arg for node in ast.walk(parts[one]) if isinstance(node, ast.arg)}
        waiting += (names & parts.keys()) - used
    found = [node for one in sorted(used) for node in (*getattr(parts[one], "decorator_list", ()), parts[one])]
    source = "\n".join(ast.get_source_segment(text, node) or "" for node in found)
    return source + ("".join(text for _, text in blocks()) if test == README_TEST else "")
