"""Is the quickstart learnt, or only its form? Train it on answers that were shuffled among the prompts of each task.

    python benchmarks/quickstart_shuffled.py

Everything else is as in ``configs/quickstart.yaml``; words of the command line are handed on to ``fit``. What a model
can then learn is how answers look, not which answer belongs to a prompt: the losses still fall far, exact match on
held-out prompts stays near 0. docs/quickstart.md records the figures.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "quickstart"


def shuffle_answers(source: Path, target: Path, seed: int = 42) -> None:
    """Write a task directory whose bot turns were dealt anew: the first among the first turns, the second likewise."""
    files = {file.name: [json.loads(line) for line in file.open()] for file in sorted(source.glob("*.jsonl"))}
    conversations = [conversation for found in files.values() for conversation in found]
    answers = [[turn for turn in c["chat_rounds"] if turn["role"] == "bot"] for c in conversations]
    rng = random.Random(f"{seed} {source.name}")
    for turns in zip(*answers, strict=True):
        contents = [turn["content"] for turn in turns]
        rng.shuffle(contents)
        for turn, content in zip(turns, contents, strict=True):
            turn["content"] = content
    target.mkdir(parents=True)
    for name, found in files.items():
        (target / name).write_text("".join(json.dumps(conversation) + "\n" for conversation in found))


def main() -> None:
    """Shuffle, train, and let the run print its table."""
    tasks = [path.name for path in sorted(EXAMPLES.iterdir())]
    with tempfile.TemporaryDirectory() as directory:
        for task in tasks:
            shuffle_answers(EXAMPLES / task, Path(directory) / task)
        paths = ",".join(str(Path(directory) / task) for task in tasks)
        command = [sys.executable, "-m", "mft_lightning", "fit", "--config", "configs/quickstart.yaml"]
        command += ["--data.data_paths", f"[{paths}]", "--output_dir", str(Path(directory) / "run"), *sys.argv[1:]]
        subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
