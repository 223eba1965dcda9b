"""The loss in chunks is the loss, and a rank without work can join a backward pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mft_lightning.data.collate import collate
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.model.module import MFTModule
from mft_lightning.model.supervised_loss import SupervisedLM


@pytest.fixture(scope="module")
def datamodule(tiny_model: Path, example_tasks: list[str]) -> MFTDataModule:
    return MFTDataModule(data_paths=example_tasks, tokenizer_path=str(tiny_model), seq_length=256, num_workers=0)


@pytest.fixture
def network(tiny_model: Path, datamodule: MFTDataModule) -> SupervisedLM:
    return MFTModule(pretrained_model_path=str(tiny_model), init="random").build(datamodule)


def test_chunks_change_neither_loss_nor_gradient(network: SupervisedLM, datamodule: MFTDataModule) -> None:
    micro = collate(datamodule.table("train"), np.arange(6), packed=True, pad_id=1)
    results = []
    for rows in (10**6, 7):
        network.logit_budget = rows * 4 * network.causal_lm.config.vocab_size
        network.zero_grad()
        output = network(micro)
        output.loss.backward()
        results.append((output, [p.grad.clone() for p in network.parameters()]))
    (whole, whole_grads), (chunked, chunked_grads) = results
    torch.testing.assert_close(chunked.nll, whole.nll)
    torch.testing.assert_close(chunked.loss, whole.loss)
    assert torch.equal(chunked.correct, whole.correct)
    for found, expected in zip(chunked_grads, whole_grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_logits_are_computed_for_supervised_tokens_only(network: SupervisedLM, datamodule: MFTDataModule) -> None:
    micro = collate(datamodule.table("train"), np.arange(4), packed=False, pad_id=1)
    seen = []
    network.causal_lm.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with torch.no_grad():
        network(micro)
    assert seen == [(len(micro.targets), network.causal_lm.config.vocab_size)]
    assert len(micro.targets) < micro.input_ids.numel() / 2


def test_correct_counts_the_likeliest_tokens(network: SupervisedLM, datamodule: MFTDataModule) -> None:
    table = datamodule.table("train")
    micro = collate(table, [3], packed=True, pad_id=1)
    ids, mask = (torch.tensor(part.astype("int64")) for part in table.row(3))
    predicted = network.causal_lm(input_ids=ids[None], use_cache=False).logits[0, :-1].argmax(-1)
    expected = int((predicted == ids[1:])[mask[1:] == 1].sum())
    assert network(micro).correct.tolist() == [expected]


def test_an_empty_micro_batch_has_a_zero_loss_and_zero_gradients(
    network: SupervisedLM, datamodule: MFTDataModule
) -> None:
    micro = collate(datamodule.table("train"), [], packed=True, pad_id=1)
    output = network(micro)
    assert output.nll.shape == (0,)
    output.loss.backward()
    grads = [p.grad for p in network.causal_lm.base_model.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_validation_sums_stay_float64_whatever_the_weights(tiny_model: Path, datamodule: MFTDataModule) -> None:
    module = MFTModule(pretrained_model_path=str(tiny_model), init="random", dtype="bfloat16")
    module.build(datamodule)
    module.to(torch.bfloat16)  # what Lightning's bf16-true plugin does
    module.validation_step(collate(datamodule.table("train"), np.arange(8), packed=True, pad_id=1), 0)
    assert {module.sums["val"].nll.dtype, module.sums["val"].tokens.dtype} == {torch.float64}
    assert int(module.sums["val"].tokens.sum()) == int(datamodule.table("train").n_supervised[:8].sum())


def test_reduction_is_float32_under_bfloat16_weights(tiny_model: Path, datamodule: MFTDataModule) -> None:
    network = MFTModule(pretrained_model_path=str(tiny_model), init="random", dtype="bfloat16").build(datamodule)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert network(collate(datamodule.table("train"), [0, 1], packed=True, pad_id=1)).nll.dtype == torch.float32
