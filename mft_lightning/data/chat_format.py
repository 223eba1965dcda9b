"""The chat format of a run: the encoder for one tokenizer, the way back to text, the template that says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mft_lightning.data.chat_encoder import ChatEncoder, marker
from mft_lightning.data.plain_texts import PlainTexts
from mft_lightning.data.records import ROLES, Conversation, Turn
from mft_lightning.errors import UserError

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- '<|role_start|>system<|role_end|>' + message['content'] -}}
    {%- elif message['role'] in ['human', 'user'] -%}
        {{- '<|role_start|>human<|role_end|>' + message['content'] -}}
    {%- elif message['role'] in ['bot', 'assistant'] -%}
        {{- '<|role_start|>bot<|role_end|>' -}}
        {% generation %}{{- message['content'] + eos_token -}}{% endgeneration %}
    {%- else -%}
        {{- raise_exception('unknown role: ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|role_start|>bot<|role_end|>' -}}{%- endif -%}
"""
# with a content of every role on both sides of a marker and of an eos, and white space at its ends
_EXAMPLE = (Turn("system", "A b."), Turn("human", " c"), Turn("bot", "\nd e"), Turn("human", "f "), Turn("bot", "g"))


def role_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int] | None:
    """The id of each role's marker where these are control tokens of the tokenizer; None where they are text."""
    if not {marker(role) for role in ROLES} <= set(tokenizer.all_special_tokens):
        return None
    return {role: int(tokenizer.convert_tokens_to_ids(marker(role))) for role in ROLES}  # type: ignore[arg-type]


class ChatFormat(ChatEncoder):
    """Encodes and decodes conversations for one tokenizer.

    Args:
        tokenizer: its eos token closes answers. Text is data: a control token written in a content is encoded as
            plain text, whatever the tokenizer. Role markers are control tokens where it has them as such (of
            :func:`~mft_lightning.data.tokenizer.add_role_tokens`), else text.
        tokenize_mode: ``sft`` supervises answers and their eos; ``pretrain`` every token but the first.
        normalize_punctuation: rewrite full-width punctuation to ASCII in all contents, as the original did.

    Raises:
        UserError: the tokenizer has no eos token, would read one of its control tokens out of plain text, or reads
            role markers otherwise than they are encoded here.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, tokenize_mode: str = "sft", normalize_punctuation: bool = False
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("data.eos_token: the tokenizer has no eos token; name one of its tokens.")
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        super().__init__(
            self._encode_in_python if backend is None else PlainTexts(backend.to_str()),
            eos_token=str(tokenizer.eos_token),
            eos_token_id=tokenizer.eos_token_id,
            pretrain=tokenize_mode == "pretrain",
            normalize_punctuation=normalize_punctuation,
            role_ids=role_ids(tokenizer),
        )
        for token in tokenizer.all_special_tokens:
            if tokenizer.convert_tokens_to_ids(token) in self.encode_texts([token])[0]:
                raise UserError(
                    f"tokenizer: {token!r} written in a conversation would become a control token. "
                    + self._remedy(token)
                )
        if self.role_ids is None:
            markers = [marker(role) for role in ROLES]
            if self.encode_texts(markers) != self.encode_one_string(markers):
                raise UserError(
                    "data.role_tokens: the tokenizer has a part of the role markers as a control token, so that it "
                    "reads them otherwise than as text. Set data.role_tokens: added."
                )
        elif self.encode([example := Conversation(_EXAMPLE)])[0].input_ids != self._read_at_once(example):
            raise UserError(
                "data.role_tokens: this tokenizer encodes a text after a control token otherwise than alone, so that "
                "markers which are tokens would not keep training and inference alike. Use text."
            )

    def _remedy(self, token: str) -> str:
        """What keeps a control token out of plain text: its mark, unless the model itself makes the token of text."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            marked = Tokenizer.from_str(backend.to_str())
            marked.add_special_tokens([token])
            if marked.token_to_id(token) not in PlainTexts(marked.to_str())([token])[0]:
                return "Mark it as a special added token in tokenizer.json."
        chosen = {self.tokenizer.pad_token: "data.pad_token", self.tokenizer.eos_token: "data.eos_token"}
        other = f", or another token as {chosen[token]}" if token in chosen else ""
        return (
            f"The tokenizer's own model makes it of plain text, marked as special or not. Use another tokenizer{other}."
        )

    @property
    def encoder(self) -> ChatEncoder:
        """The encoder alone, without the tokenizer of transformers, to hand to other processes."""
        return ChatEncoder(
            self.encode_texts,
            eos_token=self.eos_token,
            eos_token_id=self.eos_token_id,
            pretrain=self.pretrain,
            normalize_punctuation=self.normalize_punctuation,
            role_ids=self.role_ids,
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included, nothing cleaned up."""
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def encode_one_string(self, texts: Sequence[str]) -> list[list[int]]:
        """What a tokenizer makes of whole rendered conversations that it is given at once, control tokens read."""
        if not texts:  # which transformers' tokenizers do not take
            return []
        encoding: Any = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return encoding["input_ids"]

    def encode_prompt(self, turns: Sequence[Turn], answers: Sequence[Sequence[int]] | None = None) -> list[int]:
        """The ids that ask for the next answer: the history as in training, then the bot marker.

        Args:
            turns: the history.
            answers: the ids of its bot turns, each without eos, where a model gave them. Default: what the tokenizer
                makes of their text.
        """
        asked = Conversation(turns=(*turns, Turn("bot", "")))
        *history, last_answer = self.segments(asked)
        assert last_answer.answer and not last_answer.text
        if answers is None:
            return self.encode_segments([history])[0].input_ids
        stretches = iter(self.encode_texts([segment.text for segment in history if not segment.answer]))
        given = iter(answers)
        encoded = (list(next(given)) if segment.answer else next(stretches) for segment in history)
        return self._joined(history, encoded).input_ids

    def _read_at_once(self, conversation: Conversation) -> list[int]:
        return self.encode_one_string([self.render(conversation)])[0]

    def _encode_in_python(self, texts: list[str]) -> list[list[int]]:
        encoding: Any = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        return encoding["input_ids"]
