"""How long adapters take to start, by ``model.lora.init``, on one CPU core.

python benchmarks/lora_start.py                          # of width 512 with 6 layers, and of 1024 with 4
python benchmarks/lora_start.py --widths 2048 --layers 2
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch

from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.model.module import MFTModule
from mft_lightning.model.settings import LoraSettings
from mft_lightning.quiet import quieten

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "default": LoraSettings(dropout=0),
    "pissa": LoraSettings(dropout=0, init="pissa"),
    "pissa_niter_16": LoraSettings(dropout=0, init="pissa_niter_16"),
    "pissa_niter_4": LoraSettings(dropout=0, init="pissa_niter_4"),
    "olora": LoraSettings(dropout=0, init="olora"),
    "use_dora": LoraSettings(use_dora=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", default="512,1024")
    parser.add_argument("--layers", default="6,4")
    options = parser.parse_args()
    quieten()
    torch.set_num_threads(1)
    datamodule = MFTDataModule(data_paths=["examples/quickstart/text_to_code"], tokenizer_path="examples/model")
    print("| width | layers | start | CPU s |\n|---|---|---|---|")
    for width, layers in zip(options.widths.split(","), options.layers.split(","), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(ROOT / "examples" / "model", folder, dirs_exist_ok=True)
            config = json.loads((Path(folder) / "config.json").read_text()) | {
                "hidden_size": int(width),
                "intermediate_size": 4 * int(width),
                "num_hidden_layers": int(layers),
                "num_attention_heads": int(width) // 64,
            }
            (Path(folder) / "config.json").write_text(json.dumps(config))
            for kind, settings in KINDS.items():
                module = MFTModule(pretrained_model_path=folder, init="random", peft_type="lora", lora=settings)
                module.build(datamodule, sketched=True)
                assert module.built is not None and module.built.weights is not None
                plain = time.process_time()
                dict(module.built.weights)  # what the base itself takes
                start = time.process_time()
                module.built.complete()
                seconds = time.process_time() - start - (start - plain)
                print(f"| {width} | {layers} | {kind} | {max(seconds, 0):.1f} |", flush=True)


if __name__ == "__main__":
    main()
