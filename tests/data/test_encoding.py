"""Encoding goes on while Python looks for no cycles, which takes that it makes none and that Python looks again."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.encoding import encode_block
from mft_lightning.data.lines import Block

LINES = [
    b'{"prompt": "a", "answer": "b"}',
    b'{"chat_rounds": [{"role": "human", "content": "a"}, {"role": "bot", "content": "b"}]}',
    b'{"a":',
    b"[1]",
    b"\xff",
    b"[" * 100_000,
    b"9" * 5_000,
    b'{"a": 1, "a": 2}',
    b'{"text": "a"}',
    b'{"prompt": "a", "answer": ""}',
    b'{"messages": [1]}',
    b'{"chat_rounds": [{"role": "x"}]}',
    b'{"chat_rounds": [{"role": "human", "content": "\\ud800"}]}',
]
BLOCK = Block(Path("a.jsonl"), 1, b"\n".join(LINES), 0)


@pytest.fixture(params=[True, False], ids=["collected", "uncollected"])
def collects(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether Python looks for cycles."""
    before = gc.isenabled()
    (gc.enable if request.param else gc.disable)()
    yield request.param
    (gc.enable if before else gc.disable)()


def test_lines_good_and_bad_leave_no_cycles(small_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = ChatFormat(small_tokenizer).encoder
    encode_block(BLOCK, encoder, "uint16")  # what is made once is made now
    gc.collect()
    gc.disable()
    try:
        batch = encode_block(BLOCK, encoder, "uint16")
        assert gc.collect() == 0
    finally:
        gc.enable()
    assert batch.column("reason").null_count == 2 and len(batch) == len(LINES)


def test_python_looks_for_cycles_afterwards_as_before(small_tokenizer: PreTrainedTokenizerBase, collects: bool) -> None:
    encoder = ChatFormat(small_tokenizer).encoder
    encode_texts, meanwhile = encoder.encode_texts, []
    encoder.encode_texts = lambda texts: meanwhile.append(gc.isenabled()) or encode_texts(texts)
    encode_block(BLOCK, encoder, "uint16")
    assert meanwhile == [False] and gc.isenabled() is collects
    encoder.encode_texts = lambda texts: 1 / 0
    with pytest.raises(ZeroDivisionError):
        encode_block(BLOCK, encoder, "uint16")
    assert gc.isenabled() is collects
