"""Ids of texts given in any company, beside those that the library gives for each alone."""

import pickle
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase

from mft_lightning.data import plain_texts
from mft_lightning.data.plain_texts import PlainTexts

KELVIN = "\u212a"  # of which every normal form makes the letter K
NORMALIZERS = {
    "none": None,
    "nfc": normalizers.NFC(),
    "nfd": normalizers.NFD(),
    "nfkc": normalizers.NFKC(),
    "nfkd": normalizers.NFKD(),
    "lowercase": normalizers.Lowercase(),
    "sequence": normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]),
}
ADDED = {
    "nothing": [],
    "ascii": ["  ", "return x"],
    "accent": ["e\u0301"],
    "kelvin": [KELVIN],
    "ligature": ["ﬁ"],
}
PIECES = ["K", "Kelvin", KELVIN, "fi", "ﬁ", "e", "e\u0301", "é", "return x", "  ", "\n", "你好", "🙂", "<|endoftext|>"]
TEXTS = st.lists(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=6).map("".join), max_size=12)


def made(tokenizer: PreTrainedTokenizerBase, normalizer: str, added: str) -> Tokenizer:
    found = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if normalizer != "none" or added != "nothing":  # else as it comes
        found.normalizer = NORMALIZERS[normalizer]
    # as a token that is looked for in the text as it is normalised
    found.add_tokens([AddedToken(text, normalized=True) for text in ADDED[added]])
    return found


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_texts_become_what_each_is_alone(
    tokenizer: PreTrainedTokenizerBase, normalizer: str, added: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = made(tokenizer, normalizer, added)
    library.encode_special_tokens = True  # control tokens are text
    encode = PlainTexts(library.to_str())
    monkeypatch.setattr(plain_texts, "AT_ONCE", 20)  # characters, so that several are given together, and not all

    @given(texts=TEXTS)
    @settings(deadline=None, max_examples=25)
    def check(texts: list[str]) -> None:
        assert encode(texts) == [library.encode(text, add_special_tokens=False).ids for text in texts]

    check()


@pytest.mark.parametrize(
    ("normalizer", "added", "spared"),
    [("nfc", "ascii", True), ("nfkd", "nothing", True), ("nfc", "kelvin", False), ("lowercase", "nothing", False)],
)
def test_ascii_is_spared_a_normal_form_and_nothing_else(
    small_tokenizer: PreTrainedTokenizerBase, normalizer: str, added: str, spared: bool
) -> None:
    encode = PlainTexts(made(small_tokenizer, normalizer, added).to_str())
    assert (encode._for_ascii.normalizer is None) is spared
    assert (encode._for_ascii is encode._tokenizer) is not spared and encode._tokenizer.normalizer is not None


def test_a_letter_is_the_added_token_that_its_normal_form_is(small_tokenizer: PreTrainedTokenizerBase) -> None:
    library = made(small_tokenizer, "nfc", "kelvin")
    token = library.token_to_id(KELVIN)
    assert PlainTexts(library.to_str())(["K", KELVIN]) == [[token], [token]]


def test_what_is_given_at_once_is_limited_by_characters(small_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["a" * 9, "b", "c" * 30, "", "d", "é", "e"]
    with patch.object(plain_texts, "AT_ONCE", 10):
        assert [list(part) for part in plain_texts._parts(texts)] == [texts[:2], texts[2:3], texts[3:]]
        assert list(plain_texts._parts([])) == []
        encode = PlainTexts(small_tokenizer.backend_tokenizer.to_str())
        assert encode(texts) == [one for text in texts for one in encode([text])]
    assert encode([]) == []


def test_another_process_encodes_alike(small_tokenizer: PreTrainedTokenizerBase) -> None:
    encode = PlainTexts(small_tokenizer.backend_tokenizer.to_str())
    texts = ["plain", "é", "plain again"]
    assert encode(texts) == pickle.loads(pickle.dumps(encode))(texts)
