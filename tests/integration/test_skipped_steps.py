"""A loss or a gradient that is not finite costs its step, on all ranks together, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mft_lightning.cli import main
from mft_lightning.run_config import RunConfig
from tests.integration.conftest import checkpoints, metrics, same_weights, weights
from tests.integration.layouts import apart, in_series
from tests.integration.test_class_paths import DEEPSPEED, FSDP1, by_class_path

STEPS, FAULTS = 8, (4, 5)  # what is run, and which of it is skipped
RANK = {"one": 0, "ddp": 1, "fsdp": 1}  # where it goes wrong
RUNS = {"full-loss": ("full.yaml", "loss"), "lora-gradient": ("lora.yaml", "gradient")}
LORA = ("--model.lora.dropout", "0")
Arguments = Callable[..., list[str]]


def spoilt(what: str, layout: str, steps: tuple[int, ...] = FAULTS) -> tuple[str, ...]:
    """Words of a run that goes wrong at the steps, and keeps a checkpoint of every step."""
    callback, key = "--trainer.callbacks+=tests.integration.faults.NotFinite", "--trainer.callbacks"
    done = f"[{','.join(str(step - 1) for step in steps)}]"
    words = (callback, f"{key}.what={what}", f"{key}.rank={RANK[layout]}", f"{key}.steps={done}")
    words += ("--trainer.max_steps", str(STEPS), "--data.per_device_train_batch_size", "4")
    words += ("--trainer.precision", "64-true", "--evaluation.strategy", "none")
    words += LORA if what == "gradient" else ()
    words += ("--trainer.strategy", layout) if layout != "one" else ()
    return (*words, "--checkpoint.checkpointing_steps", "1", "--checkpoint.save_total_limit", "null")


def step(run: Path, number: int) -> Path:
    return run / f"step-{number:08d}"


def optimizer(checkpoint: Path) -> dict[int, dict[str, torch.Tensor]]:
    return torch.load(checkpoint / "trainer.pt", weights_only=True)["optimizer_states"][0]["state"]


def same_optimizer(ours: Path, theirs: Path) -> bool:
    first, second = optimizer(ours), optimizer(theirs)
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[number][name]) for number in first for name, value in first[number].items())


def told(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "skipped_steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def one_process(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one")
    for name, (config, what) in RUNS.items():
        fit(directory / name, *spoilt(what, "one"), config=config)
    return directory


def batch_of(arguments: list[str], number: int, layout: str) -> tuple[list[tuple[str, str]], tuple[str, str]]:
    """The conversations of a step by task and place, and the one that the callback spoils."""
    datamodule = RunConfig([*arguments, "--trainer.devices", "1"], "fit").datamodule
    datamodule.setup("fit")
    table, plan = datamodule.table("train"), datamodule.plan
    batch = plan.global_batch(*divmod(number - 1, plan.steps_per_epoch))
    mine = plan.deal(batch, RANK[layout], 1 if layout == "one" else 2)

    def named(index: int) -> tuple[str, str]:
        ((file, line),) = table.where(index)
        return datamodule.task_names[table.tasks[index]], f"{file}:{line}"

    return sorted(map(named, batch.tolist())), named(mine[0][0])


def assert_nothing_is_left(
    run: Path, what: str, batches: dict[int, tuple[list[tuple[str, str]], tuple[str, str]]]
) -> None:
    """Nothing of a skipped step is left but its row and its line."""
    first, last = FAULTS
    assert same_weights(step(run, first - 1), step(run, last))
    assert same_optimizer(step(run, first - 1), step(run, last))
    assert not same_weights(step(run, last), step(run, last + 1))
    rows = {int(row["step"]): row for row in metrics(run)}
    for number in range(1, STEPS + 1):
        row, skipped = rows[number], number in FAULTS
        assert row["train/skipped_steps"] == {first: "1", last: "2"}.get(number, "" if number < first else "2")
        assert bool(row["train/grad_norm"]) is not skipped
        assert bool(row["train/loss"]) is not (skipped and what == "loss")
    for line, number in zip(told(run), FAULTS, strict=True):
        everyone, spoilt_one = batches[number]
        found = [
            (each["task"], *(str(Path(place).resolve()) for place in each["where"])) for each in line["conversations"]
        ]
        assert line["step"] == number
        assert sorted(found) == (everyone if what == "gradient" else [spoilt_one])
        assert all((each["nll"] is None) == (what == "loss") for each in line["conversations"])
        if what == "loss":
            assert not rows[number][f"train/loss/{spoilt_one[0]}"]
            others = {task for task, _ in everyone} - {spoilt_one[0]}
            assert others and all(rows[number][f"train/loss/{task}"] for task in others)


@pytest.mark.parametrize("name", RUNS)
def test_a_skipped_step_changes_neither_weights_nor_optimizer(
    fit_arguments: Arguments, one_process: Path, tmp_path: Path, name: str
) -> None:
    arguments = fit_arguments(tmp_path, *spoilt(RUNS[name][1], "one"), config=RUNS[name][0])
    assert_nothing_is_left(
        one_process / name, RUNS[name][1], {number: batch_of(arguments, number, "one") for number in FAULTS}
    )


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_all_ranks_skip_together(fit_arguments: Arguments, one_process: Path, tmp_path: Path, layout: str) -> None:
    lines = [
        ["fit", *fit_arguments(tmp_path / name, *spoilt(what, layout), config=config)]
        for name, (config, what) in RUNS.items()
    ]
    printed = in_series(2, lines, tmp_path)
    assert printed.count("step 4 skipped: the loss is not finite of code_explanation ") == 1  # said by one rank
    assert (
        printed.count("step 5 skipped: the gradient is not finite, though the losses of its 16 conversations are") == 1
    )
    for (name, (_, what)), line in zip(RUNS.items(), lines, strict=True):
        assert_nothing_is_left(tmp_path / name, what, {number: batch_of(line[1:], number, layout) for number in FAULTS})
        assert apart(weights(step(tmp_path / name, STEPS)), weights(step(one_process / name, STEPS))) < 1e-9


@pytest.mark.parametrize(
    ("class_path", "script"), [(FSDP1, "flat_sharding.py"), (DEEPSPEED, "zero_on_cpus.py")], ids=["fsdp1", "deepspeed"]
)
def test_so_they_do_under_strategies_by_class_path(
    fit_arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, class_path: str, script: str
) -> None:
    if class_path == DEEPSPEED:
        pytest.importorskip("deepspeed", reason="deepspeed, an optional dependency, is not installed")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    lines = []
    for name, (config, what) in RUNS.items():
        words = (*spoilt(what, "ddp"), "--trainer.precision", "32-true", *by_class_path(class_path))
        lines.append(["fit", *fit_arguments(tmp_path / name, *words, config=config)])
    in_series(2, lines, tmp_path, script)
    for name, (_, what) in RUNS.items():
        arguments = fit_arguments(tmp_path, *spoilt(what, "ddp"), config=RUNS[name][0])
        assert_nothing_is_left(tmp_path / name, what, {number: batch_of(arguments, number, "ddp") for number in FAULTS})


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumed_between_skipped_steps_ends_with_the_same_bits(
    fit: Callable[..., Path], one_process: Path, tmp_path: Path, name: str
) -> None:
    config, what = RUNS[name]
    words = ("--ckpt_path", str(step(one_process / name, FAULTS[0])))
    run = fit(tmp_path / "resumed", *spoilt(what, "one"), *words, config=config)
    assert metrics(run) == metrics(one_process / name)[FAULTS[0] :]
    assert same_weights(step(run, STEPS), step(one_process / name, STEPS))
    assert same_optimizer(step(run, STEPS), step(one_process / name, STEPS))


@pytest.mark.parametrize("resumed", [False, True])
def test_so_many_in_a_row_end_the_run(
    fit_arguments: Arguments,
    one_process: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    resumed: bool,
) -> None:
    words = ("--model.max_skipped_steps", "2")
    words += ("--ckpt_path", str(step(one_process / "full-loss", FAULTS[0]))) if resumed else ()
    assert main(["fit", *fit_arguments(tmp_path / "run", *spoilt("loss", "one"), *words)]) == 1
    message = capsys.readouterr().err
    assert "step 5: this is skipped step 2 in a row (model.max_skipped_steps)" in message
    assert "skipped_steps.jsonl" in message and "Traceback" not in message
    assert metrics(tmp_path / "run")[-1]["train/skipped_steps"] == "2"  # told of the last one too
    kept = checkpoints(tmp_path / "run")
    assert kept == ([] if resumed else ["step-00000001", "step-00000002", "step-00000003", "step-00000004"])
    for name in kept:
        assert all(value.isfinite().all() for value in weights(tmp_path / "run" / name).values())


def test_steps_in_a_row_are_counted_anew_after_one_that_is_taken(fit: Callable[..., Path], tmp_path: Path) -> None:
    words = spoilt("gradient", "one", (1, 3, 5, 7))
    run = fit(tmp_path / "run", *words, "--model.max_skipped_steps", "2", config="lora.yaml")
    assert [line["step"] for line in told(run)] == [1, 3, 5, 7]
    assert optimizer(step(run, 1)) == {} and optimizer(step(run, 2)) != {}


def test_a_run_resumed_before_any_step_was_taken_goes_on(fit: Callable[..., Path], tmp_path: Path) -> None:
    words = spoilt("loss", "one", (1,))
    run = fit(tmp_path / "run", *words)
    resumed = fit(tmp_path / "resumed", *words, "--ckpt_path", str(step(run, 1)))
    assert same_weights(step(run, STEPS), step(resumed, STEPS))
    assert told(run)[0]["step"] == 1 and not (resumed / "skipped_steps.jsonl").exists()


def test_lines_of_steps_that_are_taken_again_give_way(fit: Callable[..., Path], tmp_path: Path) -> None:
    words = spoilt("loss", "one")
    run = fit(tmp_path / "run", *words)
    with (run / "skipped_steps.jsonl").open("a") as handle:
        handle.write('{"step": 6, "wh')  # as a kill may leave it
    fit(run, *words, "--ckpt_path", str(step(run, FAULTS[0])))
    assert [line["step"] for line in told(run)] == list(FAULTS)
