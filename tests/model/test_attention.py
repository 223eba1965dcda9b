"""What flash attention is told of a packed row, with a stand-in for its kernel, which needs a GPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, modeling_flash_attention_utils

from mft_lightning.model.attention import packed_row_arguments

LENGTHS = (5, 9, 1, 11)


def varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """As flash_attn's ``flash_attn_varlen_func``: rows are tokens, ``[T, heads, head]``."""
    assert causal and isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and cu_seqlens_q is cu_seqlens_k
    ends = cu_seqlens_q.tolist()
    assert max_seqlen_q == max_seqlen_k == max(end - start for start, end in pairwise(ends))
    parts = []
    for start, end in pairwise(ends):
        states = (one[start:end].transpose(0, 1)[None] for one in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*states, is_causal=True, scale=softmax_scale)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.filterwarnings("ignore")
def test_flash_attention_need_not_look_where_conversations_end(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=64
    )
    model = GPTNeoXForCausalLM(config)
    ids = torch.randint(64, (1, sum(LENGTHS)))
    given = {"input_ids": ids, "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None]}
    expected = model(**given, use_cache=False).logits

    def nobody(*_: Any) -> None:
        raise AssertionError("the device was asked")

    def imported(*_: Any, **__: Any) -> tuple[Any, ...]:
        return varlen, varlen, None, None, None

    monkeypatch.setattr(modeling_flash_attention_utils, "_is_packed_sequence", nobody)
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", imported)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    model.config._attn_implementation = "flash_attention_2"
    found = model(**given, use_cache=False, **packed_row_arguments(model, LENGTHS, ids)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
