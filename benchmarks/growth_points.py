"""One point of a curve of growth: ``fit`` in a process of its own, on conversations of drawn tokens."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import numpy as np
import pyarrow as pa

from mft_lightning.data import token_cache
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.lines import Block
from mft_lightning.data.tasks import find_tasks
from mft_lightning.data.token_cache import CacheSettings, TokenCache
from mft_lightning.data.token_store import schema
from mft_lightning.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE = 1 << 22  # tokens that are drawn
MIB = 2**20
ADAM = 12  # bytes of a float32 weight's gradient and its two moments


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run.

    Attributes:
        tasks: that the conversations are of, as many of each, give or take one.
        conversations: of all tasks.
        length: tokens of each, the second half supervised.
        batch: conversations of a step.
        micro: conversations of a micro-batch, packed.
        hidden: size of the model.
        layers: of the model.
        vocabulary: of the model.
        steps: that are timed, after the first, which is not.
        validated: whether a tenth of the conversations is validated on at the end.
    """

    tasks: int = 3
    conversations: int = 3000
    length: int = 256
    batch: int = 8
    micro: int = 8
    hidden: int = 128
    layers: int = 2
    vocabulary: int = 512
    steps: int = 5
    validated: bool = False


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run took.

    Attributes:
        step: seconds from the start of a step to the start of the next one, loading and logging included; the fewest,
            as others on the machine only add to them.
        flops: useful operations of a step, as ``train/mfu`` counts them; the median.
        memory: bytes by which the resident memory rose in the steps above what it was when the first began, without
            gradients and AdamW's moments, nor what is a file's.
        resident: bytes when the first step began, likewise.
        start: seconds from the launch to the first step.
        plan: seconds in which an epoch is planned.
        validation: seconds of the validation.
    """

    step: float
    flops: float
    memory: float
    resident: float
    start: float
    plan: float
    validation: float


class Meter(L.Callback):
    """Writes what it saw of a run as JSON.

    Args:
        file: where to.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.starts: list[float] = []
        self.flops: list[int] = []
        self.resident = self.highest = 0
        self.validation = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, number: int) -> None:
        if not self.starts:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed while all was set up would hide what steps take
            self.resident = resident("RssAnon")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.starts.append(time.time())

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *given: Any) -> None:
        self.flops.append(module.last_step.flops)
        if trainer.global_step < trainer.max_steps:  # else a validation and a save came before
            self.highest = max(self.highest, resident("VmHWM") - resident("RssFile"))

    def on_validation_start(self, trainer: L.Trainer, module: Any) -> None:
        self.validation -= time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        self.validation += time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        start = time.perf_counter()
        plan = replace(module.datamodule.plan)  # which has no epoch yet
        plan.epoch(0)
        planned = time.perf_counter() - start
        trained = ADAM * sum(one.numel() for one in module.parameters() if one.requires_grad)
        told = {
            "step": min(np.diff(self.starts)[1:].tolist()),
            "flops": statistics.median(self.flops[1:]),
            "memory": self.highest - self.resident - trained,
            "resident": self.resident,
            "start": self.starts[0],
            "plan": planned,
            "validation": self.validation,
        }
        self.file.write_text(json.dumps(told))


def resident(name: str) -> int:
    """Bytes of this process by the kernel's name for them."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * 1024


def measure(point: Point, directory: Path) -> Measured:
    """Prepare and run a point.

    Args:
        point: the run.
        directory: an empty one, for data, cache, model and run.

    Raises:
        SystemExit: the run failed; with what it said.
    """
    options = prepare(point, directory)
    told = directory / "told.json"
    meter = json.dumps([{"class_path": f"{__name__}.Meter", "init_args": {"file": str(told)}}])
    command = [sys.executable, "-m", "mft_lightning", "fit", *options, f"--trainer.callbacks={meter}"]
    launched = time.time()
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{run.stdout}{run.stderr}{point}: the run failed.")
    found = json.loads(told.read_text())
    return Measured(**found | {"start": found["start"] - launched})


def prepare(point: Point, directory: Path) -> list[str]:
    """Write the model's configuration, task directories and their token cache; the options of ``fit``."""
    model = directory / "model"
    model.mkdir()
    for file in (ROOT / "examples" / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    sizes = {
        "hidden_size": point.hidden,
        "intermediate_size": 4 * point.hidden,
        "num_attention_heads": max(1, point.hidden // 64),
        "num_hidden_layers": point.layers,
        "vocab_size": point.vocabulary,
        "max_position_embeddings": max(512, point.length),
    }
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | sizes))
    paths = [str(directory / "data" / f"task-{number}") for number in range(point.tasks)]
    for path in paths:
        Path(path).mkdir(parents=True)
        (Path(path) / "drawn.jsonl").write_text('{"text": "stands for conversations that are in the cache"}\n')
    fill_cache(point, directory / "cache", model, paths)
    given = {
        "output_dir": directory / "run",
        "data.data_paths": f"[{','.join(paths)}]",
        "data.data_split": "90,10,0" if point.validated else "100,0,0",
        "data.cache_dir": directory / "cache",
        "data.seq_length": point.length,
        "data.total_train_batch_size": point.batch,
        "data.per_device_train_batch_size": point.micro,
        "model.pretrained_model_path": model,
        "model.init": "random",
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.precision": "32-true",
        "trainer.max_steps": point.steps + 2,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "evaluation.strategy": "steps" if point.validated else "none",
        "evaluation.steps": 1_000_000,
        "evaluation.at_start": "false",
        "checkpoint.checkpointing_steps": 1_000_000,
    }
    return [f"--{key}={value}" for key, value in given.items()]


def fill_cache(point: Point, directory: Path, model: Path, paths: list[str]) -> None:
    """Write drawn conversations through the token cache, as if they had been encoded from the tasks' files."""
    cache = TokenCache(CacheSettings(directory=directory, processes=1), ChatFormat(load_tokenizer(str(model))))
    for number, task in enumerate(find_tasks(paths)):
        count = len(range(number, point.conversations, point.tasks))

        def drawn(
            blocks: Iterable[Block], encoder: Any, id_type: str, *_: Any, seed: int = number, count: int = count
        ) -> Iterator[tuple[Block, pa.RecordBatch]]:
            rng, each = np.random.default_rng(seed), max(1, AT_ONCE // point.length)
            for _, blocks_of_file in groupby(blocks, attrgetter("file")):
                block = next(blocks_of_file)
                for first in range(0, count, each):
                    yield block, draw(point, rng, first, min(each, count - first), id_type)

        with patch.object(token_cache, "encode_blocks", drawn):
            cache.open(task)


def draw(point: Point, rng: np.random.Generator, first: int, count: int, id_type: str) -> pa.RecordBatch:
    """Conversations of random tokens, the records from ``first`` on."""
    form = schema(id_type)
    largest = min(point.vocabulary, int(np.iinfo(id_type).max) + 1)
    ids = rng.integers(largest, size=count * point.length, dtype=id_type)
    spans = np.tile(np.array([point.length // 2, point.length], dtype=np.int32), count)
    ends = np.arange(count + 1, dtype=np.int32)
    columns = [
        pa.array(np.arange(first + 1, first + 1 + count)),
        pa.ListArray.from_arrays(ends * point.length, pa.array(ids), type=form.field("input_ids").type),
        pa.ListArray.from_arrays(ends * 2, pa.array(spans), type=form.field("spans").type),
        pa.array(rng.integers(1 << 64, size=count, dtype=np.uint64)),
        pa.nulls(count, pa.string()),
        pa.nulls(count, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=form)
