"""Attention over packed rows at the cost of the conversations in them, not of the row squared.

transformers' sdpa sees a packed row as one sequence with a block-diagonal mask, whose cost grows with the square of the
row. Here each conversation is a causal attention of its own over its slice of the row, which needs no mask at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mft_lightning.model.blocked_attention import blocked_causal_attention, suits_blocks

SDPA_BY_CONVERSATION = "sdpa_by_conversation"
SLICED_MODEL_TYPES = ("gpt_neox",)  # their layers hand keywords and a ready mask on to the attention function


@dataclass
class PackedRow:
    """The lengths of the conversations of a packed row; not a bare tuple, of each size of which torch.compile would
    make a graph."""

    lengths: tuple[int, ...]


def sdpa_by_conversation(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_row: PackedRow | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers' ``AttentionInterface``.

    Args:
        module: the attention layer.
        query: ``[1, heads, T, head]`` where a row is packed.
        key: like ``query``.
        value: like ``query``.
        attention_mask: read only where no row is packed.
        scaling: of the scores.
        dropout: on the attention weights.
        packed_row: its conversations, laid end to end, of lengths of sum ``T``; without it, transformers' sdpa.
        kwargs: for transformers' sdpa.

    Returns:
        ``[1, T, heads, head]``, and no weights.
    """
    if packed_row is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return by_conversation(query, key, value, scaling, dropout, packed_row).transpose(1, 2), None


@torch.compiler.disable  # its Python goes by the lengths, of which no two steps have the same
def by_conversation(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, packed_row: PackedRow
) -> Tensor:
    """Causal attention of each conversation alone; ``[1, heads, T, head]`` like ``query``, ``key`` and ``value``."""
    lengths = packed_row.lengths
    if suits_blocks(query, dropout):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return blocked_causal_attention(query[0], key[0], value[0], lengths, scale)[None]
    slices = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    attended = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling) for q, k, v in slices
    ]
    return torch.cat(attended, dim=2)


def packed_row_arguments(model: nn.Module, lengths: tuple[int, ...], like: Tensor) -> dict[str, Any]:
    """What to add to the backbone's keywords for a packed row; nothing where transformers makes the mask itself.

    A mask of four dimensions is taken as made by the caller (``_preprocess_mask_arguments`` in transformers'
    masking_utils), so that no row-squared mask is built; its values are not read. Flash attention is told where
    conversations end, which transformers would otherwise ask the device for in every layer (``_is_packed_sequence`` in
    its modeling_flash_attention_utils).
    """
    implementation = model.config._attn_implementation  # type: ignore[union-attr]
    if not lengths:
        return {}
    if implementation == SDPA_BY_CONVERSATION:
        return {"attention_mask": like.new_zeros(1, 1, 1, 1), "packed_row": PackedRow(lengths)}
    if implementation == "flash_attention_2":
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(like.device, non_blocking=True)
        longest = max(lengths)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return {}


AttentionInterface.register(SDPA_BY_CONVERSATION, sdpa_by_conversation)
AttentionMaskInterface.register(SDPA_BY_CONVERSATION, sdpa_mask)
