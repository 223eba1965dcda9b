"""Texts to ids by the tokenizers library, light enough for processes that do nothing but encode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import groupby

from tokenizers import Tokenizer
from tokenizers.normalizers import NFC, NFD, NFKC, NFKD

AT_ONCE = 1 << 14  # characters given to the library: fewer cost more of handing over, more leave the processor's cache


class PlainTexts:
    """Texts to ids by a tokenizer of the tokenizers library, every text as plain text.

    Args:
        serialized: the tokenizer, as its ``to_str`` gives it. A tokenizer of its own is made from it at first use, so
            that what others set on theirs does not count.
    """

    def __init__(self, serialized: str) -> None:
        self.serialized = serialized

    def __call__(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        for ascii_only, run in groupby(texts, str.isascii):
            tokenizer = self._for_ascii if ascii_only else self._tokenizer
            for part in _parts(run):
                ids += [encoding.ids for encoding in tokenizer.encode_batch_fast(part, add_special_tokens=False)]
        return ids

    def __reduce__(self) -> tuple[type[PlainTexts], tuple[str]]:
        return type(self), (self.serialized,)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.serialized)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a control token written in a text is text
        return tokenizer

    @cached_property
    def _for_ascii(self) -> Tokenizer:
        """The same without its Unicode normal form, which takes a fifteenth of the time to leave ASCII as it is."""
        normalizer = self._tokenizer.normalizer
        added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        if not isinstance(normalizer, NFC | NFD | NFKC | NFKD) or any(
            normalizer.normalize_str(token).isascii() != token.isascii() for token in added
        ):
            return self._tokenizer
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.normalizer = None
        tokenizer.encode_special_tokens = True
        return tokenizer


def _parts(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of few characters, a long one alone."""
    part: list[str] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part
