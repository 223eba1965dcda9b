"""The two tokenizers that the data tests run on."""

import pytest
from transformers import PreTrainedTokenizerBase

from mft_lightning.data.tokenizer import load_tokenizer
from tests.conftest import ROOT


@pytest.fixture(scope="session")
def small_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(str(ROOT / "examples" / "model"))


@pytest.fixture(scope="session", params=["examples", "gpt-neox"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param == "examples":
        return request.getfixturevalue("small_tokenizer")
    return load_tokenizer(str(request.getfixturevalue("pythia")))
