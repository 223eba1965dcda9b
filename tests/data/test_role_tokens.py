"""Role markers that are tokens: the encoder against the saved tokenizer's own reading of the rendered conversation."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mft_lightning.data.chat_encoder import marker
from mft_lightning.data.chat_format import ChatFormat
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.data.records import ROLES, Conversation, Turn
from mft_lightning.data.tokenizer import add_role_tokens, load_tokenizer, save_tokenizer
from mft_lightning.errors import UserError
from tests.conftest import ROOT
from tests.data.test_chat_format import CONTENTS, PLAIN, as_the_tokenizer_reads, by_template, conversations, messages

MARKERS = [marker(role) for role in ROLES]
EXAMPLES = str(ROOT / "examples" / "model")
checked = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="module", params=["examples", "gpt-neox"])
def trained_with(request: pytest.FixtureRequest) -> Iterator[ChatFormat]:
    path = EXAMPLES if request.param == "examples" else str(request.getfixturevalue("pythia"))
    tokenizer = load_tokenizer(path)
    add_role_tokens(tokenizer)
    yield ChatFormat(tokenizer)


@pytest.fixture(scope="module")
def server(trained_with: ChatFormat, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The tokenizer as a checkpoint has it, opened without this program."""
    directory = tmp_path_factory.mktemp("saved")
    save_tokenizer(trained_with.tokenizer, directory)
    return AutoTokenizer.from_pretrained(directory)


def read(server: PreTrainedTokenizerBase, turns: Sequence[Turn], *, ask: bool = False) -> list[int]:
    return server(by_template(server, turns, ask=ask), add_special_tokens=False)["input_ids"]


def without_control(text: str) -> bool:
    return not any(token in text for token in ("<|endoftext|>", "<|padding|>", *MARKERS))


@given(conversation=conversations(CONTENTS.filter(without_control)))
@checked
def test_a_server_reads_the_ids_that_training_used(
    trained_with: ChatFormat, server: PreTrainedTokenizerBase, conversation: Conversation
) -> None:
    assert trained_with.render(conversation) == by_template(server, conversation.turns)
    found = trained_with.encode([conversation])[0]
    assert found.input_ids == read(server, conversation.turns)
    for i, turn in enumerate(conversation.turns):
        if turn.role == "bot":  # every prompt, not the first alone
            prompt = trained_with.encode_prompt(conversation.turns[:i])
            assert prompt == read(server, conversation.turns[:i], ask=True) == found.input_ids[: len(prompt)]


@given(conversation=conversations(PLAIN | CONTENTS.filter(without_control)))
@checked
def test_the_templates_mask_is_what_is_supervised(
    trained_with: ChatFormat, server: PreTrainedTokenizerBase, conversation: Conversation
) -> None:
    templated: Any = server.apply_chat_template(
        messages(conversation.turns), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    found = trained_with.encode([conversation])[0]
    assert templated["input_ids"] == found.input_ids
    assert templated["assistant_masks"] == found.supervised


@given(conversation=conversations(CONTENTS | st.sampled_from(MARKERS)))
@checked
def test_a_marker_in_a_content_stays_text(trained_with: ChatFormat, conversation: Conversation) -> None:
    found = trained_with.encode([conversation])[0]
    ids = trained_with.role_ids
    assert ids is not None
    assert [i for i in found.input_ids if i in ids.values()] == [ids[turn.role] for turn in conversation.turns]
    assert trained_with.decode(found.input_ids) == "".join(
        as_the_tokenizer_reads(trained_with.tokenizer, part.text) + ("<|endoftext|>" if part.answer else "")
        for part in trained_with.segments(conversation)
    )


def test_a_server_cannot_tell_a_typed_marker_from_its_own(
    trained_with: ChatFormat, server: PreTrainedTokenizerBase
) -> None:
    """What docs/data.md says of it: there, and of the eos token in both kinds of markers, the two differ."""
    turns = [Turn("human", f"a{MARKERS[2]}b")]
    assert trained_with.role_ids is not None
    bot = trained_with.role_ids["bot"]
    assert trained_with.encode_prompt(turns).count(bot) == 1
    assert read(server, turns, ask=True).count(bot) == 2


def test_transformers_4_finds_the_markers_where_it_looks_for_them(
    trained_with: ChatFormat, tmp_path: Path, server: PreTrainedTokenizerBase
) -> None:
    """Of a list under the newer name 4.57 says that it has no keys, and reads no tokenizer."""
    save_tokenizer(trained_with.tokenizer, tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["additional_special_tokens"] == MARKERS and "extra_special_tokens" not in saved
    assert set(MARKERS) < set(server.all_special_tokens)


def test_plain_decoding_leaves_the_markers_out(trained_with: ChatFormat, server: PreTrainedTokenizerBase) -> None:
    ids = trained_with.encode_prompt([Turn("system", "Be brief."), Turn("human", " 1 + 1?")])
    assert server.decode(ids, skip_special_tokens=True) == "Be brief. 1 + 1?"
    assert server.decode(ids).count("<|role_start|>") == 3


def test_adding_them_again_changes_nothing(trained_with: ChatFormat, server: PreTrainedTokenizerBase) -> None:
    before = server.get_vocab(), server.all_special_tokens
    assert add_role_tokens(server) == []
    assert (server.get_vocab(), server.all_special_tokens) == before
    assert ChatFormat(server).role_ids == trained_with.role_ids


def test_tokens_that_were_no_control_tokens_become_such_and_others_stay() -> None:
    tokenizer = load_tokenizer(EXAMPLES)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|role_start|>", "<|other|>"]})
    tokenizer.add_tokens(MARKERS[:1])
    with pytest.raises(UserError, match=r"a part of the role markers as a control token.*Set data.role_tokens: added"):
        ChatFormat(tokenizer)
    assert add_role_tokens(tokenizer) == MARKERS[1:]
    assert {"<|other|>", *MARKERS} <= set(tokenizer.all_special_tokens)
    assert ChatFormat(tokenizer).encode_prompt([Turn("human", MARKERS[0])])[0] == len(tokenizer) - 2


def test_a_tokenizer_that_joins_texts_over_markers_is_refused() -> None:
    """One that puts a space before the first text alone, as some do: each content is a first text in training."""
    words = {word: i for i, word in enumerate(["<unk>", "</s>", "\u2581", *"abcdefg\u2581A.\n"])}
    made = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    add_role_tokens(tokenizer)
    with pytest.raises(UserError, match=r"data\.role_tokens: this tokenizer encodes a text after a control token"):
        ChatFormat(tokenizer)


def test_the_key_must_say_what_the_tokenizer_is(example_tasks: list[str], tmp_path: Path) -> None:
    added = MFTDataModule(data_paths=example_tasks, tokenizer_path=EXAMPLES, role_tokens="added")
    assert added.new_tokens == MARKERS and added.fingerprint["data.role_tokens"] == "added"
    added.tokenizer.save_pretrained(tmp_path)
    again = MFTDataModule(data_paths=example_tasks, tokenizer_path=str(tmp_path), role_tokens="added")
    assert again.new_tokens == [] and again.fingerprint == added.fingerprint
    with pytest.raises(UserError, match=r"has the role markers as tokens.*Set data\.role_tokens: added"):
        MFTDataModule(data_paths=example_tasks, tokenizer_path=str(tmp_path))
    text = MFTDataModule(data_paths=example_tasks, tokenizer_path=EXAMPLES)
    assert text.new_tokens == [] and text.fingerprint["data.role_tokens"] == "text"
