"""Saved models hold every weight once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from mft_lightning.model.export import save_causal_lm


def test_tied_weights_gathered_apart_are_saved_once(tiny_model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "tied"
    shutil.copytree(tiny_model, directory)
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert {"lm_head.weight", "gpt_neox.embed_in.weight"} <= state.keys()
    saved = tmp_path / "saved"
    save_causal_lm(model, state, saved)
    assert len(load_file(saved / "model.safetensors")) == len(state) - 1
    loaded = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
