"""The encoder against what nobody here wrote: the tokenizer's own call, its decoder and its chat template."""

import json
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mft_lightning.data.chat_encoder import Encoded
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.records import BadRecord, Conversation, Turn
from mft_lightning.errors import UserError

CONTROL = ["<|endoftext|>", "<|padding|>", "<|role_start|>", "<|role_end|>", "<|role_start|>bot<|role_end|>"]
AWKWARD = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "\u00a0",
    ".",
    "...",
    "<",
    "|>",
    "<|",
    "'s",
    '"',
    "{{ x }}",
    "{% if %}",
]
WORDS = [
    "Hello",
    "def f(x):",
    "    return x",
    "42",
    "é",
    "e\u0301",
    "\u0338",
    "你好",
    "🙂",
    "👩‍💻",
    "\u200b",
    "\x00",
    "ﬁ",
]
CONTENTS = st.lists(st.sampled_from(CONTROL + AWKWARD + WORDS) | st.text(max_size=6), max_size=6).map("".join)
PLAIN = st.lists(st.sampled_from(["Ask", "two words", "f(x) = 1", "Zeile", "你好"]), min_size=1, max_size=4).map(
    " und ".join
)


def conversations(contents: st.SearchStrategy[str], open_end: bool = True) -> st.SearchStrategy[Conversation]:
    def build(system: str | None, pairs: list[tuple[str, str]], last: str | None) -> Conversation:
        turns = [turn for ask, reply in pairs for turn in (Turn("human", ask), Turn("bot", reply or "."))]
        first = [] if system is None else [Turn("system", system)]
        return Conversation((*first, *turns, *([] if last is None else [Turn("human", last)])))

    pairs = st.lists(st.tuples(contents, contents), min_size=1, max_size=3)
    return st.builds(build, st.none() | contents, pairs, (st.none() | contents) if open_end else st.none())


some_conversation = given(conversation=conversations(CONTENTS))
checked = settings(deadline=None, max_examples=60)


@cache
def chat_format(tokenizer: PreTrainedTokenizerBase, mode: str = "sft") -> ChatFormat:
    return ChatFormat(tokenizer, tokenize_mode=mode)


def encoded(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, mode: str = "sft") -> Encoded:
    return chat_format(tokenizer, mode).encode([conversation])[0]


def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def by_template(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, ask: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages(turns), tokenize=False, add_generation_prompt=ask))


def before_first_answer(conversation: Conversation) -> tuple[Turn, ...]:
    return conversation.turns[: [turn.role for turn in conversation.turns].index("bot")]


def one_string(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def supervised_runs(found: Encoded) -> list[list[int]]:
    pairs = zip(found.input_ids, found.supervised, strict=True)
    return [[token for token, _ in run] for supervised, run in groupby(pairs, lambda pair: pair[1]) if supervised]


def as_the_tokenizer_reads(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The tokenizer's normal form of a text (GPT-NeoX: NFC)."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer.normalize_str(text) if normalizer else text


# --- the string


def test_the_format_is_the_one_on_the_page(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = (Turn("system", "S"), Turn("human", "i1"), Turn("bot", "o1"), Turn("human", "i2"), Turn("bot", "o2"))
    assert ChatFormat(tokenizer).render(Conversation(turns)) == (
        "<|role_start|>system<|role_end|>S<|role_start|>human<|role_end|>i1<|role_start|>bot<|role_end|>o1<|endoftext|>"
        "<|role_start|>human<|role_end|>i2<|role_start|>bot<|role_end|>o2<|endoftext|>"
    )


@some_conversation
@checked
def test_render_is_what_the_chat_template_renders(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> None:
    assert chat_format(tokenizer).render(conversation) == by_template(tokenizer, conversation.turns)


def test_the_chat_template_takes_the_usual_role_names_and_refuses_others(tokenizer: PreTrainedTokenizerBase) -> None:
    usual = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    ours = by_template(tokenizer, [Turn("human", "q"), Turn("bot", "a")])
    assert tokenizer.apply_chat_template(usual, tokenize=False) == ours
    with pytest.raises(TemplateError, match="unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "q"}], tokenize=False)


# --- the ids


@some_conversation
@checked
def test_ids_before_the_first_answer_are_the_tokenizers_for_the_rendered_prompt(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> None:
    history = before_first_answer(conversation)
    prompt = by_template(tokenizer, history, ask=True)
    found = encoded(tokenizer, conversation)
    assert found.input_ids[: found.supervised.index(1)] == one_string(tokenizer, prompt)
    assert chat_format(tokenizer).encode_prompt(history) == one_string(tokenizer, prompt)


@some_conversation
@checked
def test_a_prompt_takes_the_ids_that_a_model_answered_with(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> None:
    turns, found = conversation.turns, chat_format(tokenizer)
    history = turns if turns[-1].role == "human" else turns[:-1]
    answers = [turn.content for turn in history if turn.role == "bot"]
    plain = found.encode_prompt(history)
    assert found.encode_prompt(history, found.encode_texts(answers)) == plain
    other = [[5, 6, 5]] * len(answers)
    expected, rest = [], plain
    for ids in found.encode_texts(answers):
        closed = [*ids, tokenizer.eos_token_id]
        place = next(i for i in range(len(rest)) if rest[i : i + len(closed)] == closed)
        expected += [*rest[:place], 5, 6, 5, tokenizer.eos_token_id]
        rest = rest[place + len(closed) :]
    assert found.encode_prompt(history, other) == [*expected, *rest]


@some_conversation
@checked
def test_supervised_ids_decode_to_the_answers_each_with_its_eos(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> None:
    answers = [turn.content for turn in conversation.turns if turn.role == "bot"]
    decoded = [tokenizer.decode(run) for run in supervised_runs(encoded(tokenizer, conversation))]
    assert decoded == [as_the_tokenizer_reads(tokenizer, answer) + "<|endoftext|>" for answer in answers]


@some_conversation
@checked
def test_all_ids_decode_to_the_conversation(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> None:
    parts = [
        as_the_tokenizer_reads(tokenizer, part.text) + ("<|endoftext|>" if part.answer else "")
        for part in chat_format(tokenizer).segments(conversation)
    ]
    assert tokenizer.decode(encoded(tokenizer, conversation).input_ids) == "".join(parts)


@given(conversation=conversations(CONTENTS), mode=st.sampled_from(["sft", "pretrain"]))
@checked
def test_a_prompt_with_history_is_a_prefix_of_the_training_ids(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, mode: str
) -> None:
    ids = encoded(tokenizer, conversation, mode).input_ids
    answer_starts = [0]
    for i, turn in enumerate(conversation.turns):
        if turn.role == "bot":
            prompt = chat_format(tokenizer, mode).encode_prompt(conversation.turns[:i])
            assert ids[: len(prompt)] == prompt
            assert len(prompt) > answer_starts[-1]
            answer_starts.append(len(prompt))
    sft = encoded(tokenizer, conversation).supervised
    runs = [i for i, one in enumerate(sft) if one and not sft[i - 1]]
    assert answer_starts[1:] == runs


@given(several=st.lists(conversations(CONTENTS), max_size=4))
@settings(deadline=None, max_examples=30)
def test_a_batch_is_encoded_as_each_alone(tokenizer: PreTrainedTokenizerBase, several: list[Conversation]) -> None:
    assert chat_format(tokenizer).encode(several) == [encoded(tokenizer, one) for one in several]


# --- text is data


@some_conversation
@checked
def test_control_ids_come_from_the_encoder_alone(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> None:
    ids = encoded(tokenizer, conversation).input_ids
    assert ids.count(tokenizer.eos_token_id) == sum(turn.role == "bot" for turn in conversation.turns)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in ids


@pytest.mark.parametrize("text", CONTROL)
@pytest.mark.parametrize("mode", ["sft", "pretrain"])
def test_a_control_token_in_every_content_stays_text(tokenizer: PreTrainedTokenizerBase, text: str, mode: str) -> None:
    conversation = Conversation((Turn("system", text), Turn("human", text), Turn("bot", text)))
    found = encoded(tokenizer, conversation, mode)
    assert [i for i, token in enumerate(found.input_ids) if token in tokenizer.all_special_ids] == [
        len(found.input_ids) - 1
    ]
    assert tokenizer.decode(found.input_ids[:-1]).count(text) >= 3


@pytest.mark.parametrize("text", CONTROL)
def test_a_control_token_in_a_prompt_or_plain_text_stays_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    prompt = chat_format(tokenizer).encode_prompt([Turn("human", text)])
    assert not set(prompt) & set(tokenizer.all_special_ids)
    plain = encoded(tokenizer, Conversation(text=text), "pretrain").input_ids
    assert not set(plain[:-1]) & set(tokenizer.all_special_ids)


# --- the template's mask


def template_ids_and_mask(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> tuple[list, list]:
    found: Any = tokenizer.apply_chat_template(
        messages(conversation.turns), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], found["assistant_masks"]


@given(conversation=conversations(PLAIN))
@checked
def test_template_and_encoder_agree_in_ids_and_mask_where_answers_start_with_a_letter(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> None:
    found = encoded(tokenizer, conversation)
    assert template_ids_and_mask(tokenizer, conversation) == (found.input_ids, found.supervised)


@some_conversation
@settings(deadline=None, max_examples=120)
def test_the_templates_mask_agrees_wherever_the_ids_do(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> None:
    ids, mask = template_ids_and_mask(tokenizer, conversation)
    found = encoded(tokenizer, conversation)
    assert ids != found.input_ids or mask == found.supervised


# --- supervision


@given(conversation=conversations(CONTENTS), mode=st.sampled_from(["sft", "pretrain"]))
@checked
def test_the_first_token_is_never_supervised(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, mode: str
) -> None:
    found = encoded(tokenizer, conversation, mode)
    assert len(found.supervised) == len(found.input_ids)
    assert found.supervised[0] == 0 and sum(found.supervised) >= 2


@some_conversation
@checked
def test_pretrain_supervises_all_but_the_first_of_the_same_ids(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> None:
    found = encoded(tokenizer, conversation, "pretrain")
    assert found.input_ids == encoded(tokenizer, conversation).input_ids
    assert found.supervised == [0] + [1] * (len(found.input_ids) - 1)


@given(text=CONTENTS.filter(bool))
@checked
def test_plain_text_is_the_tokenizers_ids_and_eos_in_pretrain(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    found = encoded(tokenizer, Conversation(text=text), "pretrain")
    assert found.input_ids == [*one_string(tokenizer, text), tokenizer.eos_token_id]
    assert found.supervised == [0] + [1] * (len(found.input_ids) - 1)


def test_plain_text_is_refused_in_sft(small_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(BadRecord, match=r"text: .*tokenize_mode: pretrain, or, .*convert-data") as caught:
        encoded(small_tokenizer, Conversation(text="a"))
    assert caught.value.reason == "text-in-sft"


def test_spans_and_mask_say_the_same() -> None:
    assert Encoded([5, 6, 7, 8], [1, 2, 3, 4]).supervised == [0, 1, 0, 1]
    assert Encoded([5], []).supervised == [0]


# --- punctuation


# no-break spaces, then the full-width forms of , . ! ? : [ ] ( ) % # @ & and the digits
FULL_WIDTH = (
    "\u202f\u00a0\uff0c\u3002\uff01\uff1f\uff1a\u3010\u3011\uff08\uff09\uff05\uff03\uff20\uff06"
    "\uff10\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18\uff19"
)
ASCII = "  ,.!?:[]()%#@&0123456789"


def test_punctuation_is_left_alone_unless_asked(small_tokenizer: PreTrainedTokenizerBase) -> None:
    conversation = Conversation((Turn("human", FULL_WIDTH), Turn("bot", FULL_WIDTH)))
    assert ChatFormat(small_tokenizer).render(conversation).count(FULL_WIDTH) == 2


def test_normalize_punctuation_rewrites_every_content(tokenizer: PreTrainedTokenizerBase) -> None:
    def chat(text: str) -> Conversation:
        return Conversation((Turn("system", text), Turn("human", text), Turn("bot", text), Turn("human", text)))

    rewriting, plain = ChatFormat(tokenizer, normalize_punctuation=True), ChatFormat(tokenizer)
    assert rewriting.render(chat(f"a{FULL_WIDTH}b\uff1b")) == plain.render(chat(f"a{ASCII}b\uff1b"))
    assert rewriting.encode([chat(FULL_WIDTH)]) == plain.encode([chat(ASCII)])
    history = chat(FULL_WIDTH).turns
    assert rewriting.encode_prompt(history) == plain.encode_prompt(chat(ASCII).turns)


def test_normalize_punctuation_rewrites_plain_text(small_tokenizer: PreTrainedTokenizerBase) -> None:
    chat_format = ChatFormat(small_tokenizer, tokenize_mode="pretrain", normalize_punctuation=True)
    assert chat_format.render(Conversation(text=FULL_WIDTH)) == ASCII + "<|endoftext|>"


@given(text=CONTENTS)
@checked
def test_normalize_punctuation_touches_nothing_else(small_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    kept = "".join(sign for sign in text if sign not in FULL_WIDTH)
    conversation = Conversation((Turn("human", kept), Turn("bot", kept + "!")))
    rewriting = ChatFormat(small_tokenizer, normalize_punctuation=True)
    assert rewriting.render(conversation) == ChatFormat(small_tokenizer).render(conversation)


# --- tokenizers that cannot serve


def test_a_tokenizer_without_eos_is_refused(small_tokenizer: PreTrainedTokenizerBase) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match=r"data\.eos_token"):
        ChatFormat(bare)


def test_a_tokenizer_that_reads_its_eos_out_of_plain_text_is_refused(
    small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    for token in saved["added_tokens"]:
        token["special"] = False
    file.write_text(json.dumps(saved), encoding="utf-8")
    broken = PreTrainedTokenizerFast(tokenizer_file=str(file))
    broken.eos_token = "<|endoftext|>"
    with pytest.raises(UserError, match=r"would become a control token\. Mark it as a special added token"):
        ChatFormat(broken)


@pytest.mark.parametrize(
    ("leaking", "advice"),
    [
        ("<s>", "Use another tokenizer."),
        ("</s>", "Use another tokenizer, or another token as data.eos_token."),
        ("<pad>", "Use another tokenizer, or another token as data.pad_token."),
    ],
)
def test_a_control_token_that_is_a_piece_of_the_model_is_refused_although_it_is_marked(
    leaking: str, advice: str
) -> None:
    scores = {"<s>": -90.0, "</s>": -90.0, "<pad>": -90.0} | {leaking: -1.0}  # a piece that spelling out would not beat
    letters = dict.fromkeys("</>spad", -5.0)
    unigram = Tokenizer(models.Unigram([("<unk>", -99.0), *scores.items(), *letters.items()], unk_id=0))
    unigram.add_special_tokens(list(scores))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    made = PreTrainedTokenizerFast(tokenizer_object=unigram, **names)
    with pytest.raises(UserError) as caught:
        ChatFormat(made)
    assert str(caught.value) == (
        f"tokenizer: {leaking!r} written in a conversation would become a control token. The tokenizer's own model "
        f"makes it of plain text, marked as special or not. {advice}"
    )


def test_a_saved_tokenizer_renders_the_same(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    turns = [Turn("system", "S"), Turn("human", "q "), Turn("bot", "\na")]
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert by_template(again, turns) == ChatFormat(tokenizer).render(Conversation(tuple(turns)))
