"""What TensorBoard itself, with the server that it starts by default, shows of runs, also of one that was resumed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mft_lightning.training.chart_layout import TASKS_A_CHART, charts
from tests.integration.conftest import TASKS, metrics

Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def runs(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and one that went on from its first checkpoint in another way than it had gone before."""
    directory = tmp_path_factory.mktemp("runs")
    keep = ("--checkpoint.save_total_limit", "null", "--checkpoint.checkpointing_steps", "2")
    fit(directory / "whole", "--evaluation.exact_match_per_task", "1")
    fit(directory / "resumed", *keep, "--evaluation.steps", "3", "--trainer.max_steps", "6")
    again = ("--ckpt_path", str(directory / "resumed" / "step-00000002"), "--model.learning_rate", "2e-3")
    fit(directory / "resumed", *keep, *again, "--evaluation.steps", "4", "--trainer.max_steps", "8")
    return directory


@pytest.fixture(scope="module")
def ask(runs: Path) -> Iterator[Ask]:
    """TensorBoard's answer to a request of its page."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["-m", "tensorboard.main", "--logdir", str(runs), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def get(path: str, body: Any = None, **query: str) -> Any:
        url = f"http://127.0.0.1:{port}/data/{path}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        return json.loads(urllib.request.urlopen(request, timeout=30).read())

    try:
        for _ in range(300):
            try:
                if set(get("runs")) == {"whole/runs", "resumed/runs"} and "resumed/runs" in get("plugin/text/tags"):
                    break
            except urllib.error.URLError:
                pass
            time.sleep(0.1)
        yield get
    finally:
        server.terminate()
        server.wait()


def test_the_curves_of_a_resumed_run_have_one_past(ask: Ask, runs: Path) -> None:
    steps = {
        tag: [point[1] for point in ask("plugin/scalars/scalars", tag=tag, run="resumed/runs")]
        for tag in ("train/loss", "val/loss", "train/weight/unit_tests")
    }
    assert steps == {"train/loss": [*range(1, 9)], "val/loss": [0, 4, 8], "train/weight/unit_tests": [1, 8]}
    assert len(list((runs / "resumed" / "runs").iterdir())) == 3  # of each part its curves, and one introduction


def test_runs_are_compared_by_their_keys_and_last_metrics(ask: Ask, runs: Path) -> None:
    asked = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [],
        "startIndex": 0,
        "sliceSize": 10,
    }
    experiment = ask("plugin/hparams/experiment", {"experimentName": ""})
    assert experiment["metricInfos"][0]["name"]["tag"] == "val/loss"
    assert [info["name"] for info in experiment["hparamInfos"]][1] == "model.learning_rate"
    groups = {group["name"]: group for group in ask("plugin/hparams/session_groups", asked)["sessionGroups"]}
    assert groups.keys() == {"whole/runs", "resumed/runs"}
    for name, group in groups.items():
        keys = yaml.safe_load((runs / Path(name).parent / "config.yaml").read_text())
        assert group["hparams"]["model.learning_rate"] == keys["model"]["learning_rate"]
        assert group["hparams"]["model.weighted_loss_mode"] == "case3"
        assert group["hparams"]["model.trust_remote_code"] == "false"
        last = {metric["name"]["tag"]: metric for metric in group["metricValues"]}
        logged = metrics(runs / Path(name).parent)
        assert last["val/loss"]["trainingStep"] == 8
        (row,) = (row for row in logged if row["val/loss"] and row["step"] == "8")
        for task in TASKS:
            assert last[f"val/loss/{task}"]["value"] == pytest.approx(float(row[f"val/loss/{task}"]))


def test_the_page_of_custom_scalars_has_all_tasks_in_one_chart(ask: Ask) -> None:
    categories = ask("plugin/custom_scalars/layout")["category"]
    of_tasks, of_run = ({chart["title"]: chart["multiline"]["tag"] for chart in found["chart"]} for found in categories)
    for title in ("training loss", "validation loss", "weights in the loss"):
        (pattern,) = of_tasks[title]
        found = ask("plugin/custom_scalars/scalars", run="whole/runs", tag=pattern)["tag_to_events"]
        assert sorted(tag.split("/")[2] for tag in found) == sorted(TASKS), title
    for title, (pattern,) in of_run.items():
        assert ask("plugin/custom_scalars/scalars", run="whole/runs", tag=pattern)["tag_to_events"], title


def test_texts_and_lengths_tell_of_the_data_and_the_keys(ask: Ask, runs: Path) -> None:
    (data,) = ask("plugin/text/text", run="whole/runs", tag="run/data")
    assert data["text"].count("<table>") == 2 and all(task in data["text"].replace("&#95;", "_") for task in TASKS)
    (config,) = ask("plugin/text/text", run="resumed/runs", tag="run/config")
    assert "<pre><code>" in config["text"] and "learning_rate: 0.002" in config["text"]
    ((_, step, bins),) = ask("plugin/histograms/histograms", run="whole/runs", tag="train/tokens/unit_tests")
    assert step == 0 and sum(count for _, _, count in bins) == pytest.approx(240)


def test_many_tasks_are_also_charted_a_few_at_a_time() -> None:
    names = [f"task.{number}" for number in range(3 * TASKS_A_CHART - 1)]
    found = charts(names, ["train/loss", "val/loss", "train/weight", "val/accuracy"])
    kinds = ("Training loss", "Validation loss", "Weights in the loss")
    assert list(found)[2:] == [f"{kind}, {TASKS_A_CHART} tasks a chart" for kind in kinds]
    assert all(len(found[category]) == 3 for category in list(found)[2:])
    assert len(charts(names[:TASKS_A_CHART], ["train/loss"])) == 2


def test_another_run_s_curves_are_left_alone(
    fit: Callable[..., Path], refused: Callable[..., str], runs: Path, tmp_path: Path
) -> None:
    curves = runs / "whole" / "runs"
    before = {file: file.read_bytes() for file in curves.iterdir()}
    message = refused(tmp_path / "run", "--ckpt_path", "last", "--tensorboard_dir", str(curves))
    assert "holds another run's curves" in message
    assert {file: file.read_bytes() for file in curves.iterdir()} == before


def test_a_step_is_one_event(runs: Path) -> None:
    """So that hundreds of tasks are cheap."""
    events = EventAccumulator(str(runs / "whole" / "runs"), size_guidance={"scalars": 0})
    events.Reload()
    at_two = [e for tag in events.Tags()["scalars"] for e in events.Scalars(tag) if e.step == 2]
    assert len(at_two) > 8 and len({event.wall_time for event in at_two}) == 1
