"""Planned conversations to tensors: padded, or packed end to end in one row without padding.

No attention mask is made. Padding stands at the right, where causal attention never looks back from a real token; in a
packed row ``position_ids`` restart at every conversation, which transformers turns into block-diagonal attention as
long as ``attention_mask`` is None and ``use_cache`` is False (``find_packed_sequence_indices`` in
https://github.com/huggingface/transformers/blob/main/src/transformers/masking_utils.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mft_lightning.data.token_table import TokenTable


@dataclass
class Movable:
    """Dataclasses of tensors that Lightning moves to the device by their ``to``, and a DataLoader pins.

    Not frozen, because Lightning's half-precision plugin sets the fields of a copy.
    """

    def to(self, device: torch.device | str) -> Self:
        """On a device; from pinned memory a GPU fetches them while the host goes on.

        Lightning says ``non_blocking`` of bare tensors only (``move_data_to_device`` in
        https://github.com/Lightning-AI/pytorch-lightning/blob/master/src/lightning/fabric/utilities/apply_func.py).
        """
        return self._each(lambda one: one.to(device, non_blocking=torch.device(device).type == "cuda"))

    def pin_memory(self) -> Self:
        return self._each(Tensor.pin_memory)

    def _each(self, made: Callable[[Tensor], Tensor]) -> Self:
        """With every tensor as ``made`` gives it, those in lists of others of this kind too."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found[field.name] = made(value)
            elif isinstance(value, list):
                found[field.name] = [item._each(made) for item in value]
        return replace(self, **found)


@dataclass
class MicroBatch(Movable):
    """What one forward sees: ``C`` conversations with ``P`` supervised tokens in ``B`` rows of ``T`` tokens.

    Attributes:
        input_ids: ``int64 [B, T]``.
        position_ids: ``int64 [B, T]``, each token's place in its conversation.
        predictors: ``int64 [P]``, the flat places in ``[B * T]`` whose hidden state predicts a supervised token.
        targets: ``int64 [P]``, those supervised tokens.
        conversation: ``int64 [P]``, which of the ``C`` conversations each belongs to.
        tasks: ``int64 [C]``, task numbers.
        n_supervised: ``int64 [C]``.
        numbers: ``int64 [C]``, of the conversations in the table they are from.
        packed_lengths: of the conversations in a packed row, in order; empty where each has a row of its own.
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    conversation: Tensor
    tasks: Tensor
    n_supervised: Tensor
    numbers: Tensor
    packed_lengths: tuple[int, ...] = ()


@dataclass
class StepBatch(Movable):
    """One rank's share of an optimizer step, and counts of the whole step that every rank knows.

    Attributes:
        micros: this rank's micro-batches.
        task_conversations: ``int64 [K]``, conversations of each task in the global batch (``S_k``).
        task_supervised: ``int64 [K]``, supervised tokens of each task in the global batch (``N_k``).
        tokens: tokens of the global batch, no padding counted.
        supervised: those among them that are supervised.
        squared_lengths: the squares of its conversations' lengths, added up.
    """

    micros: list[MicroBatch]
    task_conversations: Tensor
    task_supervised: Tensor
    tokens: int
    supervised: int
    squared_lengths: int


def collate(table: TokenTable, indices: Sequence[int] | np.ndarray, *, packed: bool, pad_id: int) -> MicroBatch:
    """Lay out conversations as rows: one row each with padding at the right, or all in one row.

    No conversation at all gives a row of one pad token with nothing to predict, so that a rank without work can join
    the others' collectives.
    """
    rows = [table.row(int(index)) for index in indices]
    lengths = [len(ids) for ids, _ in rows]
    width = sum(lengths) if packed else max(lengths, default=0)
    height = 1 if packed else len(rows)
    shape = (max(1, height), max(1, width))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    position_ids = np.broadcast_to(np.arange(shape[1]), shape).copy()
    predictors, targets, conversation = [], [], []
    start = 0
    for number, (ids, supervised) in enumerate(rows):
        row, column = (0, start) if packed else (number, 0)
        input_ids[row, column : column + len(ids)] = ids
        position_ids[row, column : column + len(ids)] = np.arange(len(ids))
        places = np.flatnonzero(supervised)
        predictors.append(row * shape[1] + column + places - 1)
        targets.append(ids[places].astype(np.int64))
        conversation.append(np.full(len(places), number))
        start += len(ids)
    chosen = np.asarray(indices, dtype=np.int64)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        predictors=_joined(predictors),
        targets=_joined(targets),
        conversation=_joined(conversation),
        tasks=torch.from_numpy(table.tasks[chosen].astype(np.int64)),
        n_supervised=torch.from_numpy(table.n_supervised[chosen].astype(np.int64)),
        numbers=torch.from_numpy(chosen),
        packed_lengths=tuple(lengths) if packed else (),
    )


def collate_step(
    table: TokenTable, batch: np.ndarray, dealt: Sequence[np.ndarray], *, tasks: int, packed: bool, pad_id: int
) -> StepBatch:
    """One rank's micro-batches (``dealt``) of the global batch (``batch``), with the counts of the whole."""
    numbers, supervised = table.tasks[batch], table.n_supervised[batch]
    lengths = table.lengths[batch].astype(np.int64)
    per_task = np.bincount(numbers, weights=supervised, minlength=tasks)
    return StepBatch(
        micros=[collate(table, indices, packed=packed, pad_id=pad_id) for indices in dealt],
        task_conversations=torch.from_numpy(np.bincount(numbers, minlength=tasks)),
        task_supervised=torch.from_numpy(per_task.astype(np.int64)),
        tokens=int(lengths.sum()),
        supervised=int(supervised.sum()),
        squared_lengths=int((lengths**2).sum()),
    )


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.int64)
