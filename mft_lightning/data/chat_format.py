"""The chat format: the one encoder of training and generation, and the chat template that says the same.

A conversation is rendered as turns of ``<|role_start|>ROLE<|role_end|>CONTENT`` with nothing between them; a bot turn
ends with the eos token. Each stretch between two answers is encoded as one string and each answer alone, so that the
ids before the first answer are what the tokenizer gives for the rendered prompt at inference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from mft_lightning.data.records import BadRecord, Conversation, Turn
from mft_lightning.errors import UserError

ROLE_START, ROLE_END = "<|role_start|>", "<|role_end|>"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- '<|role_start|>system<|role_end|>' + message['content'] -}}
    {%- elif message['role'] in ['human', 'user'] -%}
        {{- '<|role_start|>human<|role_end|>' + message['content'] -}}
    {%- elif message['role'] in ['bot', 'assistant'] -%}
        {{- '<|role_start|>bot<|role_end|>' -}}
        {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- raise_exception('unknown role: ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|role_start|>bot<|role_end|>' -}}{%- endif -%}
"""

# The original's `punctuation_format`: no-break spaces to spaces, full-width signs to ASCII.
_PUNCTUATION = str.maketrans(
    "\u202f\xa0\uff0c\u3002\uff01\uff1f\uff1a\u3010\u3011\uff08\uff09\uff05\uff03\uff20\uff06"
    "\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18\uff19\uff10",
    "  ,.!?:[]()%#@&1234567890",
)


@dataclass(frozen=True)
class Segment:
    """A text that is encoded as one string; ``answer`` if it is supervised and closed by the eos token."""

    text: str
    answer: bool


@dataclass(frozen=True)
class Encoded:
    """Token ids and which of them are supervised (1) or not (0), of equal length."""

    input_ids: list[int]
    supervised: list[int]

    def truncated(self, length: int) -> Encoded:
        return Encoded(self.input_ids[:length], self.supervised[:length])


def marker(role: str) -> str:
    return f"{ROLE_START}{role}{ROLE_END}"


class ChatFormat:
    """Encodes conversations for one tokenizer.

    Args:
        tokenizer: its eos token closes answers. Text is data: a control token written in a content is encoded as
            plain text, whatever the tokenizer.
        tokenize_mode: ``sft`` supervises answers and their eos; ``pretrain`` every token but the first.
        normalize_punctuation: rewrite full-width punctuation to ASCII in all contents, as the original did.

    Raises:
        UserError: the tokenizer has no eos token, or would read one of its control tokens out of plain text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, tokenize_mode: str = "sft", normalize_punctuation: bool = False
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("data.eos_token: the tokenizer has no eos token; name one of its tokens.")
        self.tokenizer = tokenizer
        self.pretrain = tokenize_mode == "pretrain"
        self.normalize_punctuation = normalize_punctuation
        for token in tokenizer.all_special_tokens:
            if tokenizer.convert_tokens_to_ids(token) in self._encode_texts([token])[0]:
                raise UserError(
                    f"tokenizer: {token!r} written in a conversation would become a control token. "
                    "Mark it as a special added token in tokenizer.json."
                )

    def segments(self, conversation: Conversation) -> Iterator[Segment]:
        """The stretches that are encoded each as one string, in order.

        Raises:
            BadRecord: a plain text in ``sft`` mode.
        """
        if conversation.text is not None:
            if not self.pretrain:
                raise BadRecord("text-in-sft", "text: has no bot turn to learn from; set data.tokenize_mode: pretrain")
            yield Segment(self._content(conversation.text), answer=True)
            return
        stretch = ""
        for turn in conversation.turns:
            stretch += marker(turn.role)
            if turn.role == "bot":
                yield Segment(stretch, answer=False)
                yield Segment(self._content(turn.content), answer=True)
                stretch = ""
            else:
                stretch += self._content(turn.content)
        if stretch:
            yield Segment(stretch, answer=False)

    def render(self, conversation: Conversation) -> str:
        """The conversation as one string, before tokenisation."""
        eos = str(self.tokenizer.eos_token)
        return "".join(part.text + (eos if part.answer else "") for part in self.segments(conversation))

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Ids and supervision of many conversations; the tokenizer sees all their texts in one batch."""
        parts = [list(self.segments(conversation)) for conversation in conversations]
        texts = iter(self._encode_texts([part.text for segments in parts for part in segments]))
        return [self._joined(segments, [next(texts) for _ in segments]) for segments in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included, nothing cleaned up."""
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def encodes_as_one_string(self, conversations: Sequence[Conversation]) -> list[bool]:
        """Whether a tokenizer that is given the whole rendered conversation at once gives the same ids, for each."""
        if not conversations:  # which transformers' tokenizers do not take
            return []
        encoding: Any = self.tokenizer([self.render(c) for c in conversations], add_special_tokens=False, verbose=False)
        whole = encoding["input_ids"]
        return [ids == ours.input_ids for ids, ours in zip(whole, self.encode(conversations), strict=True)]

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The ids that ask for the next answer: the history as in training, then the bot marker."""
        asked = Conversation(turns=(*turns, Turn("bot", "")))
        *history, last_answer = self.segments(asked)
        assert last_answer.answer and not last_answer.text
        return self._joined(history, self._encode_texts([part.text for part in history])).input_ids

    def _joined(self, segments: Sequence[Segment], encoded: Sequence[list[int]]) -> Encoded:
        input_ids: list[int] = []
        supervised: list[int] = []
        for segment, ids in zip(segments, encoded, strict=True):
            closed = [*ids, self.tokenizer.eos_token_id] if segment.answer else ids
            input_ids += closed
            supervised += [int(segment.answer or self.pretrain)] * len(closed)
        if supervised:
            supervised[0] = 0  # nothing comes before the first token that could predict it
        return Encoded(input_ids, supervised)

    def _content(self, text: str) -> str:
        return text.translate(_PUNCTUATION) if self.normalize_punctuation else text

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoding: Any = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        return encoding["input_ids"]
