"""benchmarks/growth.py: exponents of known curves, what is said where one grows too fast, and a tiny axis for real."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks import growth
from benchmarks.growth_points import Measured, Point, fill_cache
from mft_lightning.data.datamodule import MFTDataModule

NOTHING = Measured(step=1, flops=1, memory=1, resident=1, start=1, plan=1, validation=1)
X = [1, 2, 4, 8, 16]


def test_the_exponent_is_that_of_the_upper_half() -> None:
    assert growth.exponent(X, [3 * x**0.7 for x in X]) == pytest.approx(0.7)
    assert growth.exponent(X, [500, 7, *(2 * x**1.5 for x in X[2:])]) == pytest.approx(1.5)
    assert growth.exponent(X[:2], [1, 4]) == pytest.approx(2)


@pytest.mark.parametrize(("of_step", "code"), [(1.1, 0), (1.2, 1)])
def test_what_grows_faster_than_it_may_is_told(of_step: float, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    measured = iter(replace(NOTHING, step=x**of_step, flops=x) for x in X)
    axis = growth.Axis("things", "nothing else", {x: Point() for x in X}, [growth.step(growth.FLOPS), growth.memory(0)])
    with patch.dict(growth.AXES, {"batch": axis}), patch.object(growth, "measure", lambda *_: next(measured)):
        assert growth.main(["--only", "batch"]) == code
    said = capfd.readouterr().out
    assert f"exponent {of_step:.2f} (expected at most 1.00, that of the operations)" in said
    assert said.count("OVER") == code


def test_conversations_of_the_cache_are_as_many_and_as_long_as_the_point_says(tiny_model: Path, tmp_path: Path) -> None:
    point = Point(tasks=3, conversations=32, length=10)
    paths = [str(tmp_path / name) for name in "abc"]
    for path in paths:
        Path(path).mkdir()
        (Path(path) / "drawn.jsonl").write_text("{}\n")
    with patch("benchmarks.growth_points.AT_ONCE", 40):  # tokens, so that several batches are made
        fill_cache(point, tmp_path / "cache", tiny_model, paths)
    module = MFTDataModule(
        data_paths=paths,
        tokenizer_path=str(tiny_model),
        cache_dir=str(tmp_path / "cache"),
        data_split="100,0,0",
        total_train_batch_size=8,
    )
    assert [report.records for report in module.load()[0].reports] == [11, 11, 10]
    table = module.table("train")
    assert set(table.lengths) == {10} and set(table.n_supervised) == {5}
    rows = {tuple(table.row(number)[0]) for number in range(len(table))}
    assert len(rows) == 32


def test_an_axis(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    point = Point(conversations=64, length=32, hidden=64, layers=1, steps=2, validated=True)
    axis = growth.Axis("batch", "tiny", {n: replace(point, batch=n, micro=n) for n in (4, 8)}, [growth.step(1)])
    growth.follow("tiny", axis, tmp_path)
    found = json.loads((tmp_path / "tiny.json").read_text())
    tokens, supervised, hidden, vocabulary = 4 * 32, 4 * 16, 64, 512
    matrices = 6 * 12 * hidden**2 * tokens + 6 * hidden * vocabulary * supervised
    attention = 6 * hidden * 4 * 32**2  # causal: half of the square
    assert found["4"]["flops"] == pytest.approx(matrices + attention, rel=0.02)
    assert found["8"]["flops"] == 2 * found["4"]["flops"]
    for one in found.values():
        assert set(one) == set(asdict(NOTHING)) and all(value > 0 for name, value in one.items() if name != "memory")
        assert one["start"] > one["step"] + one["plan"]
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert "| 8 | " in capfd.readouterr().out
