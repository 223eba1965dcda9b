"""The tokenizer of a run: loaded, its eos and pad tokens chosen, its chat template set."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE
from transformers.utils import cached_file

from mft_lightning.data.chat_encoder import marker
from mft_lightning.data.chat_format import CHAT_TEMPLATE
from mft_lightning.data.records import ROLES
from mft_lightning.errors import UserError, first_line
from mft_lightning.paths import nearest_beside
from mft_lightning.shipped import expanded

NEOX_PAD = "<|padding|>"
# of classes of transformers 5 in transformers 4
NAMES_BEFORE = {"TokenizersBackend": "PreTrainedTokenizerFast", "GPTNeoXTokenizer": "GPTNeoXTokenizerFast"}
# one of which every tokenizer has; without any transformers makes some an empty one
FILES = (FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def has_tokenizer(path: str) -> bool:
    """Whether there is a tokenizer in a directory or hub id, damaged or not."""
    return any(cached_file(path, name, _raise_exceptions_for_missing_entries=False) is not None for name in FILES)


def saved_tokenizer(path: str, where: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory or hub id, as it is.

    Args:
        path: directory or hub id.
        where: what messages call it.

    Raises:
        UserError: it is damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers has no class of its own for what it cannot read
        raise UserError(f"{where}: its tokenizer cannot be loaded ({first_line(error)}).") from error


def load_tokenizer(
    path: str,
    *,
    eos_token: str | None = None,
    pad_token: str | None = None,
    trust_remote_code: bool = False,
    where: str = "model.tokenizer_path (default: model.pretrained_model_path)",
) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local directory or a hub id.

    Args:
        path: directory or hub id.
        eos_token: closes every answer; default the tokenizer's own.
        pad_token: fills padded rows; default ``<|padding|>`` where the tokenizer has it, else its own, else eos.
        trust_remote_code: run code that comes with the tokenizer.
        where: what messages call it.

    Raises:
        UserError: nothing there, or a token that the tokenizer lacks.
    """
    if path.startswith(("/", ".", "~")) and not expanded(path).is_dir():
        raise UserError(f"model.pretrained_model_path: no such directory: {path}.{nearest_beside(path)}")
    if Path(path).is_dir() and not has_tokenizer(path):
        raise UserError(f"{where}: no tokenizer in {path!r}. Give a directory that holds tokenizer files.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except StrictDataclassError as error:
        raise contradictory(path, error) from error
    except Exception as error:  # tokenizers has no class of its own for what it cannot read
        raise UserError(
            f"{where}: no tokenizer in {path!r} ({first_line(error)}). Give a directory that holds tokenizer files, "
            f"or a hub id that can be reached.{nearest_beside(path)}"
        ) from error
    vocabulary = tokenizer.get_vocab()
    for key, token in (("data.eos_token", eos_token), ("data.pad_token", pad_token)):
        if token is not None and token not in vocabulary:
            raise UserError(f"{key}: {token!r} is not a token of the tokenizer in {path}.")
    if eos_token is not None:
        tokenizer.eos_token = eos_token
    if pad_token is None:
        pad_token = NEOX_PAD if NEOX_PAD in vocabulary else tokenizer.pad_token or tokenizer.eos_token
    tokenizer.pad_token = pad_token
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def add_role_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Make each role's marker, like ``<|role_start|>human<|role_end|>``, one control token.

    Returns:
        Those that were no tokens before; none where the tokenizer is of a run that added them.
    """
    markers = [marker(role) for role in ROLES]
    new = [token for token in markers if token not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"additional_special_tokens": markers}, replace_extra_special_tokens=False)
    return new


def contradictory(path: str, error: StrictDataclassError) -> UserError:
    """What to tell of a model's configuration whose sizes transformers does not accept together."""
    why = str(error).splitlines()[-1].strip()
    return UserError(f"model.pretrained_model_path: the config.json of {path} contradicts itself ({why}).")


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Tells tokenizers apart that differ in a token, in its number, or in which ones end and pad."""
    said = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token, tokenizer.pad_token]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a tokenizer with its chat template, for transformers 4 too.

    Which knows other names of classes (https://github.com/huggingface/transformers/issues/47553), gives models inputs
    that they do not take unless it is told, and stops at a list of extra_special_tokens, such as role markers
    (https://github.com/huggingface/transformers/pull/45566); transformers 5 knows both names of each.
    """
    tokenizer.save_pretrained(directory)
    file = directory / TOKENIZER_CONFIG_FILE
    config = json.loads(file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = NAMES_BEFORE.get(config["tokenizer_class"], config["tokenizer_class"])
    config["model_input_names"] = tokenizer.model_input_names
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
