"""A frozen weight held as autocast converts it gives what it gives converted in every step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mft_lightning.data.collate import MicroBatch, collate
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.model.frozen import hold_as_multiplied, only_multiplied
from mft_lightning.model.module import MFTModule
from mft_lightning.model.product_dtype import computes_bfloat16
from mft_lightning.model.settings import LoraSettings
from mft_lightning.model.supervised_loss import SupervisedLM, SupervisedNLL

HALF = torch.bfloat16
needs_bfloat16 = pytest.mark.skipif(not computes_bfloat16(), reason="this CPU has no instructions for bfloat16")


@pytest.fixture(scope="module")
def datamodule(tiny_model: Path, example_tasks: list[str]) -> MFTDataModule:
    return MFTDataModule(data_paths=example_tasks, tokenizer_path=str(tiny_model), seq_length=256, num_workers=0)


def network(tiny_model: Path, datamodule: MFTDataModule, *, again: bool = False, **lora: Any) -> SupervisedLM:
    """Whose adapters have done a step, as it were, so that all of them have a gradient."""
    adapters = LoraSettings(r=4, dropout=0.1, **lora)
    options: Any = {"init": "random", "peft_type": "lora", "lora": adapters, "checkpoint_activations": again}
    module = MFTModule(pretrained_model_path=str(tiny_model), **options)
    made = module.build(datamodule)
    torch.manual_seed(1)
    for name, parameter in made.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return made.train()


def step(found: SupervisedLM, micro: MicroBatch) -> tuple[SupervisedNLL, list[torch.Tensor]]:
    torch.manual_seed(0)
    with torch.autocast("cpu", HALF):
        output = found(micro)
    output.loss.backward()
    return output, [parameter.grad for parameter in found.parameters() if parameter.grad is not None]


@needs_bfloat16
@pytest.mark.parametrize("whole", [[], ["embed_in", "lm_head"]])
@pytest.mark.parametrize(("packed", "again"), [(True, False), (False, True)])
def test_loss_and_gradients_are_autocasts_to_the_bit(
    tiny_model: Path, datamodule: MFTDataModule, whole: list[str], packed: bool, again: bool
) -> None:
    plain = network(tiny_model, datamodule, again=again, modules_to_save=whole)
    held = copy.deepcopy(plain)
    hold_as_multiplied(held, HALF, "cpu")
    micro = collate(datamodule.table("train"), np.arange(4), packed=packed, pad_id=1)
    (expected, gradients), (found, found_gradients) = step(plain, micro), step(held, micro)
    assert all(map(torch.equal, found, expected))
    assert len(gradients) >= 16 and all(map(torch.equal, found_gradients, gradients))
    held.eval(), plain.eval()
    with torch.no_grad(), torch.autocast("cpu", HALF):
        assert torch.equal(held.logits(micro), plain.logits(micro))


@needs_bfloat16
def test_what_is_more_than_multiplied_stays_as_it_is(tiny_model: Path, datamodule: MFTDataModule) -> None:
    held = network(tiny_model, datamodule)
    hold_as_multiplied(held, HALF, "cpu")
    kinds = {name: parameter.dtype for name, parameter in held.causal_lm.named_parameters()}
    halves = {name for name, kind in kinds.items() if kind == HALF}
    assert halves == {name for name in kinds if ".base_layer." in name or name.startswith("lm_head")}
    assert {kind for name, kind in kinds.items() if name not in halves} == {torch.float32}


@needs_bfloat16
def test_a_head_that_is_the_embeddings_stays_as_they_are(tiny_model: Path, datamodule: MFTDataModule) -> None:
    tied = network(tiny_model, datamodule)
    head: Any = tied.causal_lm.get_output_embeddings()
    assert head in only_multiplied(tied, "cpu")
    head.weight = tied.causal_lm.get_input_embeddings().weight
    assert head not in only_multiplied(tied, "cpu") and only_multiplied(tied, "cpu")


def test_none_is_of_a_run_that_reads_them_otherwise(
    tiny_model: Path, datamodule: MFTDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert only_multiplied(network(tiny_model, datamodule, use_dora=True), "cuda") == []
    assert (
        only_multiplied(MFTModule(pretrained_model_path=str(tiny_model), init="random").build(datamodule), "cuda") == []
    )
    adapted = network(tiny_model, datamodule)
    assert only_multiplied(adapted, "cuda")
    monkeypatch.setattr("mft_lightning.model.frozen.computes_bfloat16", lambda: False)
    assert only_multiplied(adapted, "cpu") == [] and only_multiplied(adapted, "cuda")
    adapted.causal_lm.config.model_type = "another"
    assert only_multiplied(adapted, "cuda") == []
