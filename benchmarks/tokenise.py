"""Tokenising speed and memory beside the tokenizers library's own.

    python benchmarks/tokenise.py                      speed, on 128 MiB, in turns, in one run
    python benchmarks/tokenise.py --memory --mib 2048  resident memory of `prepare` and `fit` on a corpus of 2 GiB

The corpus is made of lines of the task directories given by --data (default: the quickstart's), drawn at random with
replacement, half of it in one file and half in eight. The library gets the same texts in batches, already parsed, on as
many cores, by its own threads, in the size of batch that it is faster with; ours reads, parses and writes the cache as
well. Exit code 1 where a limit is not held.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # of the library; our processes set theirs

from mft_lightning.data.lines import read_lines
from mft_lightning.data.records import parse_record
from mft_lightning.data.task_files import find_files
from mft_lightning.data.tasks import Task, find_tasks

if TYPE_CHECKING:  # a process that encodes imports this file again, and transformers is not what is timed
    from mft_lightning.data.chat_format import ChatFormat

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = [f"examples/quickstart/{name}" for name in ("text_to_code", "code_explanation", "unit_tests")]
LEAST_SPEED, MOST_MEMORY = 0.9, 1 << 30
CHUNKS = (1 << 15, 1 << 18)  # characters that the library is given at once: the best for one core, and for two


def make_corpus(directory: Path, sources: list[str], mib: int) -> Task:
    lines = [line.raw for task in find_tasks(sources) for file in find_files(task).data for line in read_lines(file)]
    draw = random.Random(0)
    for number in range(9):
        size = (mib << 20) // (2 if number == 0 else 16)
        with (directory / f"part-{number}.jsonl").open("wb") as out:
            while out.tell() < size:
                out.write(b"\n".join(draw.choices(lines, k=1000)) + b"\n")
    return Task(directory.name, directory)


def library_seconds(chat_format: ChatFormat, task: Task, chunk: int) -> float:
    """The library's batch encoding of all texts of the corpus; reading and parsing are not timed."""
    tokenizer = chat_format.encode_texts._tokenizer  # type: ignore[attr-defined]
    seconds, texts, size = 0.0, [], 0

    def encode() -> float:
        start = time.perf_counter()
        tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return time.perf_counter() - start

    for file in find_files(task).data:
        for line in read_lines(file):
            found = [segment.text for segment in chat_format.segments(parse_record(line.raw))]
            texts += found
            size += sum(map(len, found))
            if size > chunk:
                seconds += encode()
                texts, size = [], 0
    return seconds + encode()


def our_seconds(chat_format: ChatFormat, task: Task, cores: int) -> float:
    from mft_lightning.data.token_cache import CacheSettings, TokenCache

    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        TokenCache(CacheSettings(directory=Path(directory), processes=cores), chat_format).open(task)
        return time.perf_counter() - start


def speed(options: argparse.Namespace, task: Task) -> bool:
    from mft_lightning.data.chat_format import ChatFormat
    from mft_lightning.data.tokenizer import load_tokenizer

    os.environ["RAYON_NUM_THREADS"] = str(options.cores)  # the library looks once, when it first encodes in threads
    chat_format = ChatFormat(load_tokenizer(options.tokenizer))
    size = sum(file.stat().st_size for file in find_files(task).data) / 1e6
    ours, theirs = [], []
    for _ in range(options.repeats):
        theirs.append(min(library_seconds(chat_format, task, chunk) for chunk in CHUNKS))
        ours.append(our_seconds(chat_format, task, options.cores))
        print(f"library {size / theirs[-1]:6.2f} MB/s   ours {size / ours[-1]:6.2f} MB/s", flush=True)
    ratio = statistics.median(t / o for t, o in zip(theirs, ours, strict=True))
    print(f"ours / library: {ratio:.2f} (median of {options.repeats}; at least {LEAST_SPEED})")
    return ratio >= LEAST_SPEED


def peak_memory(words: list[str]) -> tuple[int, float]:
    """The most bytes that a command and its processes hold resident at one time, and its seconds."""
    command = [sys.executable, "-m", "mft_lightning", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                tree = [watched, *watched.children(recursive=True)]
                peak = max(peak, sum(one.memory_info().rss for one in tree))
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed")
    return peak, time.perf_counter() - start


def memory(options: argparse.Namespace, task: Task, directory: Path) -> bool:
    """Each command on the corpus against the same on the little task directories that it was made of."""
    held = True
    keys = ["--config", "quickstart.yaml", "--model.pretrained_model_path", options.tokenizer]
    keys += ["--data.cache_dir", str(directory / "cache"), "--data.on_bad_record", "skip", "--data.seq_length", "512"]
    large, small = f"[{task.directory}]", f"[{','.join(options.data)}]"
    runs = {
        "prepare": ["prepare", *keys, "--data.preprocessing_num_workers", str(options.cores)],
        "fit": [
            *("fit", *keys, "--model.init", "random", "--trainer.max_steps", "20", "--trainer.max_epochs", "null"),
            *("--evaluation.max_conversations_per_task", "32", "--evaluation.exact_match_per_task", "null"),
        ],
    }
    for name, words in runs.items():
        less, _ = peak_memory([*words, "--data.data_paths", small, "--output_dir", str(directory / "small")])
        more, seconds = peak_memory([*words, "--data.data_paths", large, "--output_dir", str(directory / "large")])
        print(
            f"{name:8} {more / 2**20:7,.0f} MiB resident at most, {less / 2**20:,.0f} on little data: "
            f"{(more - less) / 2**20:,.0f} MiB more (at most {MOST_MEMORY >> 20:,}); {seconds:,.0f} s",
            flush=True,
        )
        held = held and more - less <= MOST_MEMORY
    return held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=QUICKSTART, help="task directories")
    parser.add_argument("--tokenizer", default=str(ROOT / "examples" / "model"))
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "corpus").mkdir()
        task = make_corpus(directory / "corpus", options.data, options.mib)
        what = {"corpus MiB": options.mib, "cores": options.cores, "tokenizer": Path(options.tokenizer).name}
        print(json.dumps(what), flush=True)
        return 0 if (memory(options, task, directory) if options.memory else speed(options, task)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
