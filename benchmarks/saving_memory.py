"""How much memory a rank needs while a sharded run saves a checkpoint, beside the bytes that the checkpoint holds.

    python benchmarks/saving_memory.py [--hidden 1024] [--layers 16] [--vocabulary 8192] [--ranks 2] [--forms full]

A random GPT-NeoX of that shape is trained for two steps under FSDP2 on so many CPU processes, once for each form of a
checkpoint, and saved after each. Prints for every rank how far its private memory rises above what it was before the
save: while training waits, and until the checkpoint is written, for which training waits here too. Beside it the bytes
of weights and optimizer states, 12 for each parameter, of the whole model or of the rank's own part.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sharded_start import MIB, Peak, free_port

ROOT = Path(__file__).resolve().parent.parent
FORMS = {"full": "false", "sharded": "true"}
BYTES = 12  # a float32 weight and its two moments


def measure(words: list[str], file: Path) -> None:
    """Run ``fit`` on this rank, and write down the highest rises of its saves."""
    from mft_lightning import cli
    from mft_lightning.training.checkpoint import HFModelCheckpoint

    save, rises, held = HFModelCheckpoint._save, [], []

    def watched(callback: HFModelCheckpoint, trainer: Any) -> None:
        peak = Peak()
        save(callback, trainer)
        waiting = peak.highest - peak.before
        callback._background.wait()
        rises.append((waiting, peak.end()))
        held.append(BYTES * sum(parameter.numel() for parameter in trainer.lightning_module.parameters()))

    with patch.object(HFModelCheckpoint, "_save", watched):
        code = cli.main(["fit", *words])
    if code == 0:
        file.write_text(json.dumps({"waiting": max(rises)[0], "peak": max(peak for _, peak in rises), "all": held[0]}))
    sys.stdout.flush()
    os._exit(code)


def run(ranks: int, words: list[str], directory: Path) -> list[dict[str, int]]:
    """What each rank measures."""
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    shared |= {"MALLOC_MMAP_THRESHOLD_": "65536"}  # so that what is freed is given back, and not counted
    files = [directory / f"rank{rank}.json" for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--measure", str(file), *words],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank, file in enumerate(files)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(1)
    return [json.loads(file.read_text()) for file in files]


def write(directory: Path, hidden: int, layers: int, vocabulary: int) -> None:
    """A model's configuration and tokenizer."""
    directory.mkdir()
    for file in (ROOT / "examples" / "model").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}
    shape |= {"num_hidden_layers": layers, "vocab_size": vocabulary}
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    options = parser.parse_args()
    print("form     rank  waiting MiB  peak MiB  whole MiB  its part MiB")
    for form in options.forms:
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            write(directory / "model", options.hidden, options.layers, options.vocabulary)
            words = ["--config=configs/fsdp.yaml", f"--model.pretrained_model_path={directory / 'model'}"]
            words += [f"--output_dir={directory / 'run'}", "--trainer.accelerator=cpu", "--trainer.max_steps=2"]
            words += ["--data.seq_length=512", "--data.num_workers=0", "--evaluation.strategy=none"]
            words += ["--data.per_device_train_batch_size=1", f"--data.total_train_batch_size={options.ranks}"]
            words += [f"--trainer.devices={options.ranks}", "--checkpoint.checkpointing_steps=1"]
            words += [f"--checkpoint.sharded={FORMS[form]}"]
            for rank, one in enumerate(run(options.ranks, words, directory)):
                waiting, peak, whole = (one[name] / MIB for name in ("waiting", "peak", "all"))
                row = f"{form:7}  {rank:4}  {waiting:11.0f}  {peak:8.0f}  {whole:9.0f}  {whole / options.ranks:12.0f}"
                print(row, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[3:], Path(sys.argv[2]))
    main()
