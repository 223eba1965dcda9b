"""benchmarks/step_budget.py: parts that add up to the step, and operations that torch counts too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks import step_budget
from benchmarks.roofline import ATTENTION, EMBEDDING, MLP, NORMS, work_of_step
from benchmarks.step_regions import PARTS
from mft_lightning.data.collate import MicroBatch
from mft_lightning.model.lora import LORA_TARGETS
from mft_lightning.model.supervised_loss import SupervisedLM

TOKENS, SUPERVISED = 40, 13


@pytest.mark.parametrize("method", ["full", "lora"])
def test_matrix_products_are_those_that_torch_counts(method: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3}
    model: Any = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=64))
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=LORA_TARGETS["gpt_neox"]))
    network, places = SupervisedLM(model), torch.arange(TOKENS)
    micro = MicroBatch(
        input_ids=places[None] % 64,
        position_ids=places[None],
        predictors=places[:SUPERVISED],
        targets=places[1 : SUPERVISED + 1] % 64,
        conversation=torch.zeros(SUPERVISED, dtype=torch.int64),
        tasks=torch.zeros(1, dtype=torch.int64),
        n_supervised=torch.tensor([SUPERVISED]),
        numbers=torch.zeros(1, dtype=torch.int64),
    )
    with FlopCounterMode(display=False) as counter:
        network(micro).loss.backward()
    counted = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for operator, count in counted.items() if "attention" not in operator)
    module: Any = SimpleNamespace(network=network, product_dtype=torch.float32)
    batch: Any = SimpleNamespace(tokens=TOKENS, supervised=SUPERVISED, squared_lengths=TOKENS**2)
    works = work_of_step(module, batch, clipped=True)
    assert sum(work.flops for part, work in works.items() if part != ATTENTION) == products
    assert works[ATTENTION].flops == 3 * 2 * 32 * 3 * TOKENS**2
    weights = sum(p.numel() for p in network.causal_lm.base_model.layers[0].mlp.parameters() if p.ndim == 2)
    assert works[MLP].moved > 3 * weights * 4 * 2


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_parts_add_up_to_the_step(
    tiny_model: Path, example_tasks: list[str], capsys: pytest.CaptureFixture[str], method: str
) -> None:
    words = ["--model", str(tiny_model), "--data", *example_tasks, "--method", method, "--steps", "2", "--threads", "1"]
    assert (
        step_budget.main([*words, "--operators", "1000", "--", "--data.seq_length", "256", "--data.num_workers", "0"])
        == 0
    )
    said = capsys.readouterr().out
    rows = {cells[1]: cells[2:-1] for line in said.splitlines() if (cells := [c.strip() for c in line.split("|")])[1:]}
    whole, parts = float(rows["a step"][2]), {part: [float(cell) for cell in rows[part][:3]] for part in PARTS}
    assert sum(together for _, _, together in parts.values()) == pytest.approx(whole, rel=0.05)
    assert all(ahead + back == pytest.approx(together, abs=0.11) for ahead, back, together in parts.values())
    backward = {  # operators that are the way back of one part alone
        "aten::gelu_backward": MLP,
        "aten::native_layer_norm_backward": NORMS,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": ATTENTION,
        **({"aten::embedding_dense_backward": EMBEDDING} if method == "full" else {}),
    }
    for operator, part in backward.items():
        found = [line.partition(" ms  ")[2] for line in said.splitlines() if line.endswith(f": {operator}")]
        assert found == [f"{part}, backward: {operator}"]
