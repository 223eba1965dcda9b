"""TRL's SFTTrainer on the work, in each of its ways to lay out a batch, with its own loss.

python -m benchmarks.throughput.trl_sft DIRECTORY SETTING METHOD PRECISION

TRL packs a whole dataset, best fit first, so that a step would have other conversations than with the other contenders.
Here its packer is given one micro-batch after the other, of each of which it makes one row. ``loss_type`` is left at
"nll", the default; "chunked_nll" is another name of it in TRL 1.16.
"""

from __future__ import annotations

import sys

from datasets import Dataset, concatenate_datasets
from trl import SFTConfig, SFTTrainer, pack_dataset

from benchmarks.throughput.hf_trainer import Gated, Pause, arguments, read_model, read_tokenizer
from benchmarks.throughput.pausing import Gate
from benchmarks.throughput.workload import Workload

SETTINGS = ("packing=bfd", "padding_free", "padded")


class GatedSFTTrainer(Gated, SFTTrainer):
    """TRL's own, but for that."""


def packed_rows(workload: Workload) -> Dataset:
    """A row for each micro-batch, of TRL's packer."""
    conversations, rows = workload.read_conversations(), []
    for start in range(0, len(conversations), workload.rows):
        micro_batch = conversations[start : start + workload.rows]
        tokens = sum(len(conversation["input_ids"]) for conversation in micro_batch)
        rows.append(pack_dataset(Dataset.from_list(micro_batch), tokens, "bfd"))
        assert len(rows[-1]) == 1
    return concatenate_datasets(rows)


def main(directory: str, setting: str, method: str, precision: str) -> None:
    workload = Workload.read(directory)
    given = arguments(workload, precision) | {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    if setting == "packing=bfd":
        dataset = packed_rows(workload)
        given |= {"packing": True, "per_device_train_batch_size": 1}
    else:
        dataset = Dataset.from_list(workload.read_conversations())
        given |= {"padding_free": setting == "padding_free"}
    gate = Gate(workload.device)
    trainer = GatedSFTTrainer(
        model=read_model(workload, method, precision),
        args=SFTConfig(**given),
        train_dataset=dataset,
        processing_class=read_tokenizer(workload),
        callbacks=[Pause(gate)],
    )
    trainer.gate = gate
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
