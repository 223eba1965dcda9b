"""Compiled layers train as layers do, are compiled for training alone, and once for all lengths."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mft_lightning.data.collate import MicroBatch, collate
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.model.compiled import compile_layers
from mft_lightning.model.module import MFTModule
from mft_lightning.model.settings import LoraSettings
from mft_lightning.model.supervised_loss import SupervisedLM


@pytest.fixture(scope="module")
def datamodule(tiny_model: Path, example_tasks: list[str]) -> MFTDataModule:
    return MFTDataModule(data_paths=example_tasks, tokenizer_path=str(tiny_model), seq_length=256, num_workers=0)


@pytest.fixture(autouse=True)
def traced_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is traced is run without a C++ compiler; tests/integration/test_compiled.py has the whole of it."""
    monkeypatch.setattr(torch, "compile", lambda what, **options: COMPILE(what, backend="aot_eager", **options))
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


COMPILE = torch.compile


def network(tiny_model: Path, datamodule: MFTDataModule, **options: Any) -> SupervisedLM:
    module = MFTModule(pretrained_model_path=str(tiny_model), init="random", **options)
    return module.build(datamodule).double().train()


def micro(datamodule: MFTDataModule, *numbers: int, packed: bool = True) -> MicroBatch:
    return collate(datamodule.table("train"), np.array(numbers), packed=packed, pad_id=1)


def gradients(found: SupervisedLM, batch: MicroBatch) -> tuple[Tensor, list[Tensor]]:
    output = found(batch)
    output.loss.backward()
    return output.nll, [parameter.grad for parameter in found.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(("packed", "adapters", "again"), [(True, True, False), (False, False, True)])
def test_losses_and_gradients_are_those_of_layers_as_they_are(
    tiny_model: Path, datamodule: MFTDataModule, packed: bool, adapters: bool, again: bool
) -> None:
    """In a first step, and in another, of other lengths, for which nothing is compiled any more."""
    options: Any = {"peft_type": "lora", "lora": LoraSettings(r=4, dropout=0)} if adapters else {}
    plain = network(tiny_model, datamodule, checkpoint_activations=again, **options)
    compiled = copy.deepcopy(plain)
    compile_layers(compiled)
    graphs = []
    for numbers in ((0, 1, 2), (3, 4, 5, 6)):
        batch = micro(datamodule, *numbers, packed=packed)
        (expected, theirs), (found, ours) = gradients(plain, batch), gradients(compiled, batch)
        torch.testing.assert_close(found, expected)
        assert len(ours) == len(theirs) > 0
        torch.testing.assert_close(ours, theirs)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


def test_validation_and_answers_compile_nothing(tiny_model: Path, datamodule: MFTDataModule) -> None:
    plain = network(tiny_model, datamodule).eval()
    found = copy.deepcopy(plain)
    compile_layers(found)
    with torch.no_grad():
        assert torch.equal(found(micro(datamodule, 0, 1)).nll, plain(micro(datamodule, 0, 1)).nll)
        ids = torch.arange(5, 9)[None]
        answers = [one.generate(input_ids=ids, max_new_tokens=3, do_sample=False) for one in (found, plain)]
    assert torch.equal(*answers)
    assert counters["stats"]["unique_graphs"] == 0


def test_names_in_the_state_are_the_same(tiny_model: Path, datamodule: MFTDataModule) -> None:
    found = network(tiny_model, datamodule)
    before = list(found.state_dict())
    compile_layers(found)
    assert list(found.state_dict()) == before
