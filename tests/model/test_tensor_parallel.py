"""What cannot be shared out over devices is refused; that the rest takes the same steps, test_layouts.py shows."""

from __future__ import annotations

import os

import pytest
from transformers import GPT2Config, GPTNeoXConfig, PretrainedConfig

from mft_lightning.errors import UserError
from mft_lightning.model.tensor_parallel import check_tensor_parallel
from tests.integration import preloaded

NEOX = GPTNeoXConfig(hidden_size=48, num_attention_heads=6, intermediate_size=100)


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (NEOX, 4, r"parallel\.tensor_parallel_size: 4 does not divide the model's num_attention_heads \(6\)"),
        (NEOX, 3, r"3 does not divide the model's intermediate_size \(100\)"),
        (GPT2Config(), 2, "how to cut a gpt2 is not known"),
    ],
)
def test_what_cannot_be_cut_is_refused(config: PretrainedConfig, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_tensor_parallel(config, size)


def test_one_device_cuts_nothing() -> None:
    check_tensor_parallel(GPT2Config(), 1)
    check_tensor_parallel(NEOX, 2)


def test_a_narrowed_sketch_has_the_shapes_of_one_device() -> None:
    words = ["tests/model/split_on_two_ranks.py"]
    done = preloaded.run_on_ranks(2, words, {**os.environ, "PYTHONPATH": str(preloaded.ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "the same shapes\n"
