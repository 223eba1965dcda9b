"""The gradient of an optimizer step depends on its conversations alone, and is what a plain loop over them gives."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.model.module import MFTModule
from mft_lightning.model.settings import LoraSettings

WEIGHTS = {"text_to_code": 1.0, "code_explanation": 2.0, "unit_tests": 0.5}
MODES = ["case1", "case2", "case3", "case4"]
LORA = LoraSettings(r=4, dropout=0.0)


class Gradients(L.Callback):
    """Keeps the gradients of the first step, as they are before clipping."""

    def on_before_optimizer_step(self, trainer: L.Trainer, module: MFTModule, optimizer: torch.optim.Optimizer) -> None:
        named = module.network.model.named_parameters()
        self.found = {name: p.grad.clone() for name, p in named if p.grad is not None}


def make(tiny_model: Path, tasks: list[str], mode: str, *, total: int = 16, **data: object) -> MFTDataModule:
    weights = WEIGHTS if mode in ("case3", "case4") else None
    return MFTDataModule(
        data_paths=tasks,
        tokenizer_path=str(tiny_model),
        seq_length=256,
        total_train_batch_size=total,
        task_weights=weights,
        num_workers=0,
        **data,
    )


def one_step(
    tiny_model: Path, datamodule: MFTDataModule, mode: str, tmp_path: Path, **model: object
) -> tuple[dict[str, Tensor], MFTModule]:
    """Gradients of the first optimizer step through Lightning, and the module that took it."""
    module = MFTModule(pretrained_model_path=str(tiny_model), init="random", weighted_loss_mode=mode, **model)
    module.build(datamodule)
    if module.peft_type == "lora":  # away from the start, where half of the gradients are zero
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for name, parameter in module.network.model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
    gradients = Gradients()
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[gradients],
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=datamodule)
    return gradients.found, module


def plain_loop(tiny_model: Path, datamodule: MFTDataModule, mode: str) -> tuple[float, dict[str, Tensor]]:
    """The design's formula, conversation by conversation, through transformers' own forward in float64."""
    fresh = MFTModule(pretrained_model_path=str(tiny_model), init="random", dtype="float64")
    model = fresh.build(datamodule).model
    assert isinstance(model, GPTNeoXForCausalLM)
    table = datamodule.table("train")
    batch = datamodule.plan.global_batch(0, 0)
    supervised, conversations = defaultdict(int), defaultdict(int)
    for i in batch:
        supervised[table.tasks[i]] += int(table.row(i)[1].sum())
        conversations[table.tasks[i]] += 1
    scaled = datamodule.task_weights or [1.0] * 3
    total = 0.0
    for i in batch:
        ids, mask = (torch.tensor(part.astype("int64")) for part in table.row(i))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        nll = -logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        nll = nll[mask[1:] == 1].sum()
        task, n = table.tasks[i], int(mask.sum())
        factor = {
            "case1": 1 / sum(supervised.values()),
            "case2": 1 / (len(batch) * n),
            "case3": scaled[task] / (len(supervised) * supervised[task]),
            "case4": scaled[task] / (len(supervised) * conversations[task] * n),
        }[mode]
        (factor * nll).backward()
        total += factor * float(nll)
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative distance of all gradients taken as one vector."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[k].double() - expected[k].double()).square().sum()) for k in expected)
    return (difference / sum(float(g.double().square().sum()) for g in expected.values())) ** 0.5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_mode", ["padding", "pack"])
def test_gradient_equals_a_plain_loop_at_every_micro_batch(
    tiny_model: Path, example_tasks: list[str], tmp_path: Path, mode: str, padding_mode: str
) -> None:
    expected_loss, expected = plain_loop(tiny_model, make(tiny_model, example_tasks, mode), mode)
    for size in (1, 2, 4, 8):
        datamodule = make(tiny_model, example_tasks, mode, padding_mode=padding_mode, per_device_train_batch_size=size)
        found, module = one_step(tiny_model, datamodule, mode, tmp_path)
        assert distance(found, expected) < 1e-5, size
        assert float(module.last_step.loss) == pytest.approx(expected_loss, rel=1e-5), size


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_gradients_equal_padded_ones_with_every_attention(
    tiny_model: Path, example_tasks: list[str], tmp_path: Path, attention: str
) -> None:
    found = {}
    for padding_mode in ("padding", "pack"):
        datamodule = make(tiny_model, example_tasks, "case3", padding_mode=padding_mode, per_device_train_batch_size=8)
        found[padding_mode], module = one_step(tiny_model, datamodule, "case3", tmp_path, attn_implementation=attention)
        assert module.network.causal_lm.config.use_cache is True  # the model's default
        found[padding_mode]["loss"] = module.last_step.loss
    assert distance(found["pack"], found["padding"]) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_lora_gradient_is_the_same_in_every_layout(
    tiny_model: Path, example_tasks: list[str], tmp_path: Path, mode: str
) -> None:
    found = {}
    for padding_mode, size in (("padding", 1), ("padding", 8), ("pack", 2), ("pack", 8)):
        datamodule = make(tiny_model, example_tasks, mode, padding_mode=padding_mode, per_device_train_batch_size=size)
        found[padding_mode, size], _ = one_step(
            tiny_model, datamodule, mode, tmp_path, peft_type="lora", lora=LORA, dtype="float64"
        )
    reference = found["padding", 1]
    assert reference and all("lora_" in name for name in reference)
    for layout, gradients in found.items():
        assert distance(gradients, reference) < 1e-10, layout


def test_every_option_of_the_loss_is_the_same_in_every_layout(
    tiny_model: Path, example_tasks: list[str], tmp_path: Path
) -> None:
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "focal_gamma": 2.0}
    found = {}
    for padding_mode, size in (("padding", 1), ("pack", 8)):
        datamodule = make(
            tiny_model, example_tasks, "case2", padding_mode=padding_mode, per_device_train_batch_size=size
        )
        found[size], module = one_step(tiny_model, datamodule, "case2", tmp_path, **options)
    assert distance(found[8], found[1]) < 1e-5
    expected, table = 0.0, datamodule.table("train")
    model = MFTModule(pretrained_model_path=str(tiny_model), init="random", dtype="float64").build(datamodule).model
    for index in datamodule.plan.global_batch(0, 0):
        ids, mask = (torch.tensor(part.astype("int64")) for part in table.row(index))
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1][mask[1:] == 1]
        wanted, functional = ids[1:][mask[1:] == 1], torch.nn.functional
        nll = functional.cross_entropy(logits, wanted, reduction="none")
        smooth = functional.cross_entropy(logits, wanted, reduction="none", label_smoothing=0.1)
        focal = 0.9 * ((1 - torch.exp(-nll)) ** 2 - 1) * nll
        expected += float((smooth + focal + 1e-2 * logits.logsumexp(-1) ** 2).mean()) / 16
    assert float(module.last_step.loss) == pytest.approx(expected, rel=1e-5)


def test_a_batch_with_an_absent_task_weighs_the_tasks_that_are_there(
    tiny_model: Path, example_tasks: list[str], tmp_path: Path
) -> None:
    """Two conversations cannot hold three tasks; the weight of a task alone in its batch is not cancelled."""
    for mode in ("case3", "case4"):
        datamodule = make(tiny_model, example_tasks, mode, total=2, per_device_train_batch_size=2)
        expected_loss, expected = plain_loop(tiny_model, datamodule, mode)
        found, module = one_step(tiny_model, datamodule, mode, tmp_path)
        assert distance(found, expected) < 1e-5
        assert float(module.last_step.loss) == pytest.approx(expected_loss, rel=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_conversations_do_not_see_each_other(
    tiny_model: Path, example_tasks: list[str], attention: str, checkpointed: bool
) -> None:
    """Each conversation's NLL in a packed row, with the model's default config, equals that of it alone."""
    datamodule = make(tiny_model, example_tasks, "case3", per_device_train_batch_size=8)
    module = MFTModule(
        pretrained_model_path=str(tiny_model),
        init="random",
        attn_implementation=attention,
        checkpoint_activations=checkpointed,
    )
    network = module.build(datamodule)
    assert network.causal_lm.config.use_cache is True  # the default that would let them see each other
    batch = datamodule.train_dataloader().dataset[0, 0]
    plan, table = datamodule.plan, datamodule.table("train")
    dealt = plan.deal(plan.global_batch(0, 0), 0, 1)
    for micro, indices in zip(batch.micros, dealt, strict=True):
        packed = network(micro).nll
        for place, index in enumerate(indices):
            ids, mask = (torch.tensor(part.astype("int64")) for part in table.row(index))
            logits = network.causal_lm(input_ids=ids[None], use_cache=False).logits[0, :-1]
            alone = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[mask[1:] == 1].sum()
            assert float(packed[place]) == pytest.approx(float(alone), rel=1e-5)
