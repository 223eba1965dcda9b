"""What ``config.json`` says to readers other than transformers 5.

Which alone knows ``rope_parameters``: with nothing else in the file, transformers 4 and servers built on it take a
quarter of each head to be rotated, whatever the model does, and llama.cpp's converter finds no ``rotary_pct`` at all.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers.utils import CONFIG_NAME


def add_older_names(directory: Path) -> None:
    """Say what a saved GPT-NeoX's ``config.json`` holds under the names of transformers 4 too.

    transformers 5 reads a file with both as it reads its own.

    Args:
        directory: with a ``config.json`` that transformers 5 wrote.
    """
    file = directory / CONFIG_NAME
    config = json.loads(file.read_text(encoding="utf-8"))
    if config["model_type"] != "gpt_neox":
        return
    rope = config["rope_parameters"]
    config["rotary_pct"], config["rotary_emb_base"] = rope["partial_rotary_factor"], rope["rope_theta"]
    config["torch_dtype"] = config["dtype"]
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
