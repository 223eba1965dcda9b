"""Every layout, micro-batch, padding, weighting and kind of training gives the numbers of a loop over conversations.

A run is one epoch of four steps, on global batches of all kinds: all tasks, two of them, one, and few conversations.
Its learning rate is so small that no weight changes to the bit, so all steps are compared at the same weights.
``pytest -rP`` prints how far the numbers were apart. By default one process takes all of them in float32; two ranks
take each kind of training, padding and weighting with one micro-batch, so that any two choices of these four meet in
each layout; and bfloat16 takes one micro-batch for all, of which two ranks take every other, and none under tensor
parallelism. ``MFT_WHOLE_MATRIX=1`` takes everything everywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, combinations, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mft_lightning.data.batch_sizes import derive_batch_sizes
from mft_lightning.data.datamodule import MFTDataModule
from tests.integration.conftest import ROOT, TASKS, metrics, weights
from tests.integration.layouts import in_series
from tests.integration.reference import ALPHA, Measured, R, adapter_weight, measure, plain_name, step_numbers

LAYOUTS: dict[str, tuple[str, int, dict[str, str]]] = {
    "one": ("auto", 1, {}),
    "ddp2": ("ddp", 2, {}),
    "fsdp2": ("fsdp", 2, {}),
    "tensor2": ("fsdp", 2, {"--parallel.tensor_parallel_size": "2"}),
}
TOLERANCES = {"32-true": 1e-5, "bf16-mixed": 1e-2}
KINDS, PADDINGS = ("full", "lora"), ("padding", "pack")
MODES, SIZES = ("case1", "case2", "case3", "case4"), (1, 2, 8)
COUNTS = {"text_to_code": 40, "code_explanation": 6, "unit_tests": 5}  # conversations of each task
TASK_WEIGHTS = {"text_to_code": 1.0, "code_explanation": 2.0, "unit_tests": 0.5}
WHOLE = "MFT_WHOLE_MATRIX" in os.environ
REST = pytest.mark.skipif(not WHOLE, reason="MFT_WHOLE_MATRIX=1 runs all of it, in minutes")
TOTAL, STEPS, SEED = 16, 4, 4491  # of the seed, test_the_epoch_has_every_kind_of_batch tells what it must give


@dataclass(frozen=True)
class Case:
    """One run of the matrix."""

    layout: str
    precision: str
    kind: str
    padding: str
    mode: str
    size: int

    def __str__(self) -> str:
        return f"{self.layout} {self.precision} {self.kind} {self.padding} {self.mode} micro-batch {self.size}"

    @property
    def turn(self) -> int:
        """Counts up with each choice but the micro-batch."""
        return KINDS.index(self.kind) + PADDINGS.index(self.padding) + MODES.index(self.mode)

    @property
    def directory(self) -> str:
        return str(self).replace(" ", "-")

    @property
    def words(self) -> list[str]:
        """Its options of the command line."""
        words = {
            "--trainer.strategy": LAYOUTS[self.layout][0],
            "--trainer.precision": self.precision,
            "--data.padding_mode": self.padding,
            "--model.weighted_loss_mode": self.mode,
            "--data.per_device_train_batch_size": str(self.size),
            **LAYOUTS[self.layout][2],
        }
        if self.mode in ("case3", "case4"):
            words["--data.task_weights"] = json.dumps(TASK_WEIGHTS)
        if self.kind == "lora":
            words |= {"--model.lora.r": str(R), "--model.lora.alpha": str(ALPHA), "--model.lora.dropout": "0"}
            words["--trainer.callbacks+"] = "tests.integration.reference.KnownAdapters"
        return [word for pair in words.items() for word in pair]


@dataclass(frozen=True)
class Epoch:
    """A model with weights and the task directories of one epoch."""

    model: Path
    tasks: list[str]

    @property
    def words(self) -> list[str]:
        words = {
            "--seed_everything": str(SEED),
            "--data.data_paths": f"[{','.join(self.tasks)}]",
            "--data.data_split": "100,0,0",
            "--data.total_train_batch_size": str(TOTAL),
            "--model.pretrained_model_path": str(self.model),
            "--model.init": "pretrained",
            "--model.learning_rate": "1e-300",
            "--model.min_lr": "0",
            "--model.num_warmup_steps": "0",
            "--trainer.max_steps": "-1",
            "--trainer.max_epochs": "1",
            "--evaluation.strategy": "none",
        }
        return [word for pair in words.items() for word in pair]

    @cached_property
    def data(self) -> MFTDataModule:
        return MFTDataModule(
            data_paths=self.tasks,
            tokenizer_path=str(self.model),
            data_split="100,0,0",
            seq_length=512,
            total_train_batch_size=TOTAL,
            seed=SEED,
        )

    @cached_property
    def batches(self) -> list[list[int]]:
        """The conversations of each step."""
        return [self.data.plan.global_batch(0, step).tolist() for step in range(self.data.plan.steps_per_epoch)]

    @cached_property
    def measured(self) -> dict[str, Measured]:
        return {kind: measure(self.model, self.data.table("train"), kind) for kind in KINDS}

    def expected(self, case: Case) -> list[dict[str, float]]:
        """What ``metrics.csv`` must say of each step."""
        mean = sum(TASK_WEIGHTS.values()) / len(TASK_WEIGHTS)
        scaled = [TASK_WEIGHTS[name] / mean for name in TASKS]
        return [step_numbers(self.measured[case.kind], batch, case.mode, list(TASKS), scaled) for batch in self.batches]

    def of_tasks(self, row: dict[str, str]) -> float:
        """The loss of case3, made of the losses of the tasks that are in a row."""
        mean = sum(TASK_WEIGHTS.values()) / len(TASK_WEIGHTS)
        found = {name: float(row[f"train/loss/{name}"]) for name in TASKS if row[f"train/loss/{name}"]}
        return sum(TASK_WEIGHTS[name] / mean * loss for name, loss in found.items()) / len(found)

    def tasks_of(self, conversations: list[int]) -> set[int]:
        return set(self.data.table("train").tasks[conversations].tolist())

    def dealt(self, padding: str, size: int, world: int) -> Iterator[list[list[int]]]:
        """The micro-batches of all ranks that each full batch of several tasks is dealt out in."""
        sizes = derive_batch_sizes(TOTAL, size, None, devices=world)
        plan = replace(self.data.plan, packed=padding == "pack", sizes=sizes)
        for batch, numbers in zip(self.batches, (plan.global_batch(0, step) for step in range(STEPS)), strict=True):
            assert batch == numbers.tolist()
            if len(batch) == TOTAL and len(self.tasks_of(batch)) > 1:
                yield [micro.tolist() for micro in plan.deal_to_all(numbers, world)]


@pytest.fixture(scope="session")
def epoch(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Epoch:
    """The first conversations of the examples, and a model of which no bias is zero and no norm is one."""
    directory = tmp_path_factory.mktemp("matrix")
    for name, count in COUNTS.items():
        lines = (ROOT / "examples" / "quickstart" / name / "part_0.jsonl").read_text().splitlines(keepends=True)
        (directory / name).mkdir()
        (directory / name / "part.jsonl").write_text("".join(lines[:count]))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    assert model.config.hidden_dropout == model.config.attention_dropout == 0
    model.save_pretrained(directory / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory / "model")
    return Epoch(directory / "model", [str(directory / name) for name in TASKS])


def test_the_epoch_has_every_kind_of_batch(epoch: Epoch) -> None:
    tasks = [epoch.tasks_of(batch) for batch in epoch.batches]
    full, last = tasks[:-1], epoch.batches[-1]
    assert len(epoch.batches) == STEPS and all(len(batch) == TOTAL for batch in epoch.batches[:-1])
    assert sorted(len(found) for found in full) == [1, 2, 3]  # one task alone, one absent, all there
    assert 1 < len(last) < TOTAL and len(tasks[-1]) > 1
    for padding, size, world in product(PADDINGS, SIZES, (1, 2)):  # of full batches that have several tasks
        dealt = list(epoch.dealt(padding, size, world))
        micros = [micro for batch in dealt for micro in batch if len(micro) >= size]
        assert any(len(epoch.tasks_of(micro)) == 1 for micro in micros), (padding, size, world)
        if world > 1:
            ranks = [[*chain(*batch[rank::world])] for batch in dealt for rank in range(world)]
            assert any(len(epoch.tasks_of(rank)) == 1 for rank in ranks), (padding, size, world)


def by_turns(cases: list[Case], sizes: tuple[int, ...]) -> list[Case]:
    """The cases where each micro-batch has its turn, or every other one where there is but one micro-batch."""
    if len(sizes) == 1:
        return [case for case in cases if case.turn % 2 == 0]
    return [case for case in cases if case.size == sizes[case.turn % len(sizes)]]


@pytest.mark.parametrize("sizes", [SIZES, (2,)], ids=["float32", "bf16"])
def test_any_two_choices_meet_on_two_ranks(sizes: tuple[int, ...]) -> None:
    choices = (KINDS, PADDINGS, MODES, sizes)
    cases = by_turns([Case("ddp2", "32-true", *rest) for rest in product(*choices)], sizes)
    found = [(case.kind, case.padding, case.mode, case.size) for case in cases]
    for first, second in combinations(range(len(choices)), 2):
        assert {(row[first], row[second]) for row in found} == {*product(choices[first], choices[second])}


@pytest.mark.parametrize(
    ("precision", "sizes"),
    [("32-true", SIZES), ("bf16-mixed", (2,)), pytest.param("bf16-mixed", (1, 8), marks=REST)],
    ids=["float32", "bf16", "bf16-rest"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_those_of_a_loop_over_conversations(
    epoch: Epoch,
    fit: Callable[..., Path],
    fit_arguments: Callable[..., list[str]],
    tmp_path: Path,
    layout: str,
    precision: str,
    sizes: tuple[int, ...],
) -> None:
    if layout == "tensor2" and precision == "bf16-mixed" and not WHOLE:
        pytest.skip("MFT_WHOLE_MATRIX=1 runs all of it, in minutes")
    ranks = LAYOUTS[layout][1]
    cases = [Case(layout, precision, *rest) for rest in product(KINDS, PADDINGS, MODES, sizes)]
    if ranks > 1 and not WHOLE:
        cases = by_turns(cases, sizes)
    if ranks == 1:
        for case in cases:
            fit(tmp_path / case.directory, *epoch.words, *case.words, config=f"{case.kind}.yaml")
    else:
        lines = []
        for case in cases:
            words = (*epoch.words, *case.words)
            lines.append(["fit", *fit_arguments(tmp_path / case.directory, *words, config=f"{case.kind}.yaml")])
        in_series(ranks, lines, tmp_path)
    worst: dict[str, tuple[float, str]] = {}
    wrong: list[str] = []
    for case in cases:
        _check_weights(epoch, tmp_path / case.directory / f"step-{STEPS:08d}", case)
        for quantity, error, told in _differences(epoch, tmp_path / case.directory, case):
            worst[quantity] = max(worst.get(quantity, (0.0, "")), (error, told))
            if not error <= TOLERANCES[precision]:
                wrong.append(told)
    for quantity, (_, told) in worst.items():
        print(f"furthest apart of {quantity}: {told}")
    assert not wrong, f"{len(wrong)} numbers of {len(cases)} runs are wrong, the first:\n" + "\n".join(wrong[:20])


def _differences(epoch: Epoch, directory: Path, case: Case) -> Iterator[tuple[str, float, str]]:
    """Kind of quantity, relative error and a line about every number of a run."""
    rows = metrics(directory)
    assert [row["step"] for row in rows] == [str(step + 1) for step in range(STEPS)], case
    for row, expected in zip(rows, epoch.expected(case), strict=True):
        losses = {name for name in row if name.startswith("train/loss")}
        assert losses == {"train/loss", *(f"train/loss/{name}" for name in TASKS)}, case
        gaps = {name for name in losses if row[name] == ""}  # not a zero, nor anything else
        assert gaps == losses - expected.keys(), (str(case), row)
        if case.mode == "case3":  # whatever rounds the tasks' losses, nothing rounds what they count
            assert float(row["train/loss"]) == pytest.approx(epoch.of_tasks(row), rel=1e-5), (str(case), row)
        for name, number in expected.items():
            found = float(row[name])
            error = abs(found - number) / abs(number)
            quantity = "a task's loss" if name.count("/") == 2 else name
            told = (
                f"{case}, step {row['step']}, {name}: found {found!r}, expected {number!r}, relative error {error:.1e}"
            )
            yield quantity, error, told


def _check_weights(epoch: Epoch, checkpoint: Path, case: Case) -> None:
    """What trains must be where it started, to the bit: else later steps are compared at other weights."""
    found = weights(checkpoint)
    started = load_file(epoch.model / "model.safetensors")
    if case.kind == "lora":
        started = {name: adapter_weight(plain_name(name), value.shape) for name, value in found.items()}
        assert len(found) == 16 and all("lora_" in name for name in found), case
    assert found.keys() == started.keys(), case
    assert all(torch.equal(found[name], started[name]) for name in found), case
