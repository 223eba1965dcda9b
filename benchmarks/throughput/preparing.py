"""Write the work of a comparison: a base, an adapter, and the steps that this program plans, as ids for all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.throughput.ours import fit_options
from benchmarks.throughput.table import Work
from benchmarks.throughput.workload import Workload
from mft_lightning.commands.planned import PlannedRun
from mft_lightning.errors import UserError
from mft_lightning.model.flops import UsefulFlops
from mft_lightning.model.lora import LORA_TARGETS
from mft_lightning.model.source import load_config

MODEL_TYPE = "gpt_neox"
IGNORED = -100  # the label of what is not supervised


def prepare(workload: Workload, model: Path, methods: list[str], warm_up: int) -> dict[str, Work]:
    """Write everything that contenders read.

    Args:
        workload: what they are to do.
        model: directory of a GPT-NeoX configuration and its tokenizer.
        methods: with which they train.
        warm_up: steps that are not measured; the last of the workload is only begun.

    Returns:
        What the measured steps hold, for each method.

    Raises:
        UserError: the data has fewer steps, or cannot be used.
    """
    _make_base(workload, model)
    workload.write()
    run = PlannedRun(fit_options(workload, "packed", "full", "32-true"))
    run.datamodule.setup("fit")
    table, plan = run.datamodule.table("train"), run.datamodule.plan
    if plan.steps_per_epoch <= workload.steps:
        raise UserError(
            f"--data: steps of {workload.conversations} conversations in it: {plan.steps_per_epoch}, and more than "
            f"{workload.steps} are wanted. Give more data, fewer --rounds or fewer --conversations."
        )
    conversations: list[dict[str, list[int]]] = []
    for step in range(workload.steps):
        for index in plan.global_batch(0, step):
            ids, supervision = table.row(int(index))
            labels = [int(token) if counts else IGNORED for token, counts in zip(ids, supervision, strict=True)]
            conversations.append({"input_ids": ids.tolist(), "labels": [IGNORED, *labels[1:]]})
    (Path(workload.directory) / "conversations.json").write_text(json.dumps(conversations))
    measured = workload.steps_of(conversations)[warm_up:-1]
    lengths = [[len(conversation["input_ids"]) for conversation in step] for step in measured]
    supervised = [sum(label != IGNORED for row in step for label in row["labels"]) for step in measured]
    return {
        method: Work([sum(step) for step in lengths], supervised, _flops(workload, method, lengths, supervised))
        for method in methods
    }


def _make_base(workload: Workload, model: Path) -> None:
    """Write the base, random weights under the configuration in ``model``, and the adapter that is put on it."""
    from peft import LoraConfig, get_peft_model  # which imports bitsandbytes, whose complaint is then kept quiet

    config = load_config(str(model), MODEL_TYPE)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base.save_pretrained(workload.model)
    for file in model.glob("tokenizer*"):
        shutil.copy(file, workload.model)
    base.name_or_path = workload.model  # which the adapter names as its base
    targets = LORA_TARGETS[MODEL_TYPE]
    adapters = LoraConfig(r=workload.rank, lora_alpha=2 * workload.rank, lora_dropout=0.0, target_modules=targets)
    get_peft_model(base, adapters).save_pretrained(workload.adapter)


def _flops(workload: Workload, method: str, lengths: list[list[int]], supervised: list[int]) -> list[int]:
    """Useful operations of each step; the base's bits make no difference."""
    run = PlannedRun(fit_options(workload, "packed", "full" if method == "full" else "lora", "32-true"))
    useful = UsefulFlops.of(run.network().causal_lm)
    return [
        useful.of_step(sum(step), count, sum(length**2 for length in step))
        for step, count in zip(lengths, supervised, strict=True)
    ]
