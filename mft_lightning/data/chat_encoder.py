"""The one encoder of training and generation, light enough for processes that do nothing but encode.

A conversation is rendered as turns of ``<|role_start|>ROLE<|role_end|>CONTENT`` with nothing between them; a bot turn
ends with the eos token. Each stretch between two answers is encoded as one string and each answer alone, so that the
ids before the first answer are what the tokenizer gives for the rendered prompt at inference. Where role markers are
tokens of their own, each content is encoded alone, and so is every content of a rendered conversation then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from mft_lightning.data.records import BadRecord, Conversation

ROLE_START, ROLE_END = "<|role_start|>", "<|role_end|>"

# The original's `punctuation_format`: no-break spaces to spaces, full-width signs to ASCII.
_PUNCTUATION = str.maketrans(
    "\u202f\xa0\uff0c\u3002\uff01\uff1f\uff1a\u3010\u3011\uff08\uff09\uff05\uff03\uff20\uff06"
    "\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18\uff19\uff10",
    "  ,.!?:[]()%#@&1234567890",
)


class Segment(NamedTuple):
    """A text that is encoded as one string, or that one token stands for.

    Attributes:
        text: as it is rendered.
        answer: whether it is supervised and closed by the eos token.
        token: the id that stands for it; None encodes the text.
    """

    text: str
    answer: bool = False
    token: int | None = None


class Encoded(NamedTuple):
    """Token ids, and where they are supervised: flat ``[start, end, start, end, …]`` places in ``input_ids``."""

    input_ids: list[int]
    spans: list[int]

    @property
    def supervised(self) -> list[int]:
        """1 for every supervised id and 0 for the others."""
        mask = [0] * len(self.input_ids)
        for start, end in zip(self.spans[::2], self.spans[1::2], strict=True):
            mask[start:end] = [1] * (end - start)
        return mask


def marker(role: str) -> str:
    return f"{ROLE_START}{role}{ROLE_END}"


class ChatEncoder:
    """Encodes conversations.

    Args:
        encode_texts: texts to the ids of each, with no special token added and none read out of the text.
        eos_token: closes every answer.
        eos_token_id: its id.
        pretrain: supervise every token but the first, not answers and their eos alone.
        normalize_punctuation: rewrite full-width punctuation to ASCII in all contents, as the original did.
        role_ids: the token that each role's marker is; None where markers are ordinary text.
    """

    def __init__(
        self,
        encode_texts: Callable[[list[str]], list[list[int]]],
        *,
        eos_token: str,
        eos_token_id: int,
        pretrain: bool,
        normalize_punctuation: bool,
        role_ids: Mapping[str, int] | None = None,
    ) -> None:
        self.encode_texts = encode_texts
        self.eos_token, self.eos_token_id = eos_token, eos_token_id
        self.pretrain, self.normalize_punctuation = pretrain, normalize_punctuation
        self.role_ids = role_ids

    def segments(self, conversation: Conversation) -> Iterator[Segment]:
        """The stretches that are encoded each as one string, and markers that are tokens, in order.

        Raises:
            BadRecord: a plain text in ``sft`` mode.
        """
        if conversation.text is not None:
            if not self.pretrain:
                raise BadRecord(
                    "text-in-sft",
                    "text: has no bot turn to learn from; set data.tokenize_mode: pretrain, or, of an Alpaca file with "
                    "a text beside its instructions, give what convert-data makes of it",
                )
            yield Segment(self.content(conversation.text), answer=True)
            return
        stretch = ""
        for turn in conversation.turns:
            if self.role_ids is None:
                stretch += marker(turn.role)
            else:
                if stretch:
                    yield Segment(stretch)
                yield Segment(marker(turn.role), token=self.role_ids[turn.role])
                stretch = ""
            if turn.role == "bot":
                if stretch:
                    yield Segment(stretch)
                yield Segment(self.content(turn.content), answer=True)
                stretch = ""
            else:
                stretch += self.content(turn.content)
        if stretch:
            yield Segment(stretch)

    def render(self, conversation: Conversation) -> str:
        """The conversation as one string, before tokenisation."""
        return "".join(part.text + (self.eos_token if part.answer else "") for part in self.segments(conversation))

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Ids and supervision of many conversations; the tokenizer sees all their texts in one batch."""
        return self.encode_segments([list(self.segments(conversation)) for conversation in conversations])

    def encode_segments(self, parts: Sequence[Sequence[Segment]]) -> list[Encoded]:
        """Ids and supervision of many conversations, each given as its segments."""
        texts = [segment.text for segments in parts for segment in segments if segment.token is None]
        encoded = iter(self.encode_texts(texts)) if texts else iter([])
        return [self._joined(segments, encoded) for segments in parts]

    def _joined(self, segments: Sequence[Segment], encoded: Iterator[list[int]]) -> Encoded:
        input_ids: list[int] = []
        spans: list[int] = []
        for _, answer, token in segments:
            start = len(input_ids)
            input_ids += next(encoded) if token is None else [token]
            if answer:
                input_ids.append(self.eos_token_id)
                if not self.pretrain:
                    spans += (start, len(input_ids))
        if self.pretrain:
            spans = [0, len(input_ids)]
        if spans and spans[0] == 0:  # nothing comes before the first token that could predict it
            spans = [1, *spans[1:]] if spans[1] > 1 else spans[2:]
        return Encoded(input_ids, spans)

    def content(self, text: str) -> str:
        """A turn's content as it is encoded."""
        return text.translate(_PUNCTUATION) if self.normalize_punctuation else text
