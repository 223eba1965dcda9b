"""How much memory a rank needs while a sharded run starts, beside the share that it keeps.

    python benchmarks/sharded_start.py [--hidden 1024] [--layers 16] [--vocabulary 8192] [--ranks 1,2,4] [--kinds whole]

A random GPT-NeoX of that shape is written to a temporary directory, in parts. Then it is started under FSDP2 on so many
CPU processes: full, with adapters, and as a random draw; and, for comparison, as a random draw that is whole before it
is sharded. Prints the highest private memory of any rank above what it had before, beside the bound: its share of the
model and the largest unit (a layer, or the embeddings and the head), which is gathered in every forward anyway. Mapped
pages of weight files are not private: the system takes them back when it needs them.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MIB = 2**20
KINDS = ("pretrained", "adapters", "random", "whole")


def private() -> int:
    """Bytes of this process that are not a file's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


class Peak:
    """The highest private memory while it watches, sampled every millisecond."""

    def __init__(self) -> None:
        self.before = self.highest = private()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.highest = max(self.highest, private())

    def end(self) -> int:
        self._done.set()
        self._thread.join()
        return self.highest - self.before


def measure(directory: str, kind: str) -> dict[str, int]:
    """The growth of this rank while the model starts, the model's bytes, and those of its largest unit."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from mft_lightning.data.tokenizer import load_tokenizer
    from mft_lightning.model.build import make_network
    from mft_lightning.model.objective import Objective
    from mft_lightning.model.parallel import ParallelSettings, shard, transformer_layers
    from mft_lightning.model.settings import LoraSettings
    from mft_lightning.model.source import ModelSource

    init = "random" if kind in ("random", "whole") else "pretrained"
    source = ModelSource(
        path=directory,
        init=init,
        model_type="gpt_neox",
        dtype=torch.float32,
        attn_implementation="sdpa",
        trust_remote_code=False,
        seed=1,
    )
    tokenizer = load_tokenizer("examples/model")
    adapters = LoraSettings(r=16) if kind == "adapters" else None
    import peft  # noqa: F401  # before anything is counted, as the model's own module
    from transformers.models.gpt_neox import modeling_gpt_neox  # noqa: F401

    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("data_parallel",))
    torch.distributed.barrier()
    peak = Peak()
    built = make_network(
        source,
        tokenizer,
        adapters=adapters,
        quantization=None,
        objective=Objective(),
        random_base=directory,
        checkpoint_activations=False,
        pad_vocab_to_multiple_of=None,
        packed=True,
        sketched=kind != "whole",
    )
    sizes = {id(p): p.numel() * p.element_size() for p in built.network.parameters()}
    layers = [sum(sizes[id(p)] for p in layer.parameters()) for layer in transformer_layers(built.network)]
    model = sum(sizes.values())
    shard(built.network, mesh, ParallelSettings(), "32-true", built.complete)
    return {"peak": peak.end(), "model": model, "unit": max(*layers, model - sum(layers))}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run(ranks: int, directory: str, kind: str) -> dict[str, int]:
    """The rank that needs the most."""
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": "1"}
    shared |= {"MALLOC_MMAP_THRESHOLD_": "65536"}  # so that what is freed is given back, and not counted
    words = [sys.executable, __file__, "--measure", directory, kind]
    processes = [
        subprocess.Popen(
            words,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    told = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(1)
    return max((json.loads(line) for line in told), key=lambda one: one["peak"])


def write(directory: str, hidden: int, layers: int, vocabulary: int) -> None:
    import torch
    from transformers import GPTNeoXConfig

    from mft_lightning.model.export import save_base
    from mft_lightning.model.weights import DrawnWeights, sketch

    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
    )
    model = sketch(config, torch.float32)
    save_base(model, DrawnWeights(model, torch.float32, 1), Path(directory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--kinds", default=",".join(KINDS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write(directory, options.hidden, options.layers, options.vocabulary)
        print("start       ranks  model MiB  unit MiB  bound MiB  peak MiB  of bound  seconds")
        for kind in options.kinds.split(","):
            for ranks in map(int, options.ranks.split(",")):
                begin = time.perf_counter()
                one = run(ranks, directory, kind)
                bound = one["model"] / ranks + one["unit"]
                print(
                    f"{kind:10}  {ranks:5}  {one['model'] / MIB:9.1f}  {one['unit'] / MIB:8.1f}  {bound / MIB:9.1f}  "
                    f"{one['peak'] / MIB:8.1f}  {one['peak'] / bound:8.2f}  {time.perf_counter() - begin:7.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        from mft_lightning import meeting, ranks

        ranks.join()
        if not ranks.are_several():
            import torch

            torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=meeting.host_store(0))
        print(json.dumps(measure(sys.argv[2], sys.argv[3])))
        sys.stdout.flush()
        os._exit(0)
    main()
