"""Write the quickstart example: three small programming tasks and a small GPT-NeoX without weights.

Everything follows from the seed, so two runs with the same seed write the same bytes. Every answer follows
from its prompt alone, so a model that has learnt the rules also answers the prompts held out for validation.
"""

import argparse
import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

NOUNS = ("cost", "delay", "depth", "height", "length", "level")
NOUNS += ("price", "score", "size", "speed", "value", "weight")
NUMBERS = range(2, 10)
# The verb in the function's name, the change in words, the operator.
CHANGES = (
    ("raise", "adds {number} to {target}", "+"),
    ("lower", "subtracts {number} from {target}", "-"),
    ("scale", "multiplies {target} by {number}", "*"),
    ("split", "divides {target} by {number}", "/"),
)
# The comparison in words, the operator, and its value just below the limit, at the limit and just above it.
COMPARISONS = (
    ("above", ">", (False, False, True)),
    ("below", "<", (True, False, False)),
    ("at least", ">=", (False, True, True)),
    ("at most", "<=", (True, True, False)),
    ("equal to", "==", (False, True, False)),
    ("other than", "!=", (True, False, True)),
)

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
VOCABULARY_SIZE = 512
CONTEXT_LENGTH = 512

Turn = tuple[str, str]  # the role, the content


def text_to_code(rng: random.Random, count: int) -> Iterator[list[Turn]]:
    """A described function, written in Python. A system turn comes first."""
    choices = list(product(NOUNS, CHANGES, NUMBERS, COMPARISONS, NUMBERS))
    for noun, (verb, words, operator), number, (relation, test, _), limit in rng.sample(choices, count):
        change = words.format(number=number, target="it")
        prompt = f"Write a function `{verb}_{noun}` that takes a {noun} and {change} if it is {relation} {limit}."
        answer = (
            f"def {verb}_{noun}({noun}):\n"
            f"    if {noun} {test} {limit}:\n"
            f"        return {noun} {operator} {number}\n"
            f"    return {noun}"
        )
        yield [("system", "Reply with Python code only."), ("human", prompt), ("bot", answer)]


def code_explanation(rng: random.Random, count: int) -> Iterator[list[Turn]]:
    """A function explained in words, and then, in a second round, changed."""
    choices = list(product(NOUNS, CHANGES, NUMBERS, COMPARISONS, NUMBERS))
    for noun, (verb, words, operator), number, (relation, test, _), limit in rng.sample(choices, count):
        nouns = f"{noun}s"
        change = words.format(number=number, target="each")
        new_limit = rng.choice([other for other in NUMBERS if other != limit])
        code = (
            f"def {verb}_{nouns}({nouns}):\n"
            f"    return [{noun} {operator} {number} for {noun} in {nouns} if {noun} {test} "
        )
        yield [
            ("human", f"Explain this function:\n\n{code}{limit}]"),
            ("bot", f"It keeps the {nouns} {relation} {limit}, {change} and returns the new list."),
            ("human", f"Change the limit to {new_limit}."),
            ("bot", f"{code}{new_limit}]"),
        ]


def unit_tests(rng: random.Random, count: int) -> Iterator[list[Turn]]:
    """A comparison, tested just below its limit, at the limit and just above it."""
    choices = list(product(NOUNS, COMPARISONS, NUMBERS))
    for noun, (_, test, expected), limit in rng.sample(choices, count):
        name = f"check_{noun}"
        lines = [f"def test_{name}():"]
        for value, outcome in zip((limit - 1, limit, limit + 1), expected, strict=True):
            lines.append(f"    assert {name}({value}) is {outcome}")
        prompt = f"Write a test for this function:\n\ndef {name}({noun}):\n    return {noun} {test} {limit}"
        yield [("human", prompt), ("bot", "\n".join(lines))]


# The generator, the number of conversations and the number of files of every task.
TASKS = {
    "text_to_code": (text_to_code, 600, 3),
    "code_explanation": (code_explanation, 400, 2),
    "unit_tests": (unit_tests, 240, 1),
}


def train_tokenizer(conversations: list[list[Turn]]) -> Tokenizer:
    """A byte-level BPE trained on the conversations, in the chat format in which a model reads them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [f"<|role_start|>{role}<|role_end|>{content}" for turns in conversations for role, content in turns]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """What transformers needs beside tokenizer.json."""
    return {
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": CONTEXT_LENGTH,
        "pad_token": PADDING,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": END_OF_TEXT,
    }


def model_config(tokenizer: Tokenizer) -> dict[str, object]:
    """A GPT-NeoX of about one million parameters, with the vocabulary rounded up to a multiple of 64."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "eos_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "hidden_size": 128,
        "initializer_range": 0.088,  # 1 over the root of hidden_size: learns to copy early
        "intermediate_size": 512,
        "max_position_embeddings": CONTEXT_LENGTH,
        "model_type": "gpt_neox",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "rotary_pct": 1.0,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "vocab_size": (tokenizer.get_vocab_size() + 63) // 64 * 64,
    }


def write(path: Path, text: str) -> None:
    """Put the file in place in one step, so that a run cut short leaves no half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    unfinished.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write the value as sorted, indented JSON."""
    write(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def main() -> None:
    """Write the tasks, train the tokenizer on them, and write the model's configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent, help="folder to write to")
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()

    conversations: list[list[Turn]] = []
    for task, (generate, count, files) in TASKS.items():
        lines = []
        for number, turns in enumerate(generate(random.Random(f"{arguments.seed} {task}"), count)):
            rounds = [{"role": role, "content": content} for role, content in turns]
            lines.append(json.dumps({"id": number, "data_name": task, "chat_rounds": rounds}) + "\n")
            conversations.append(turns)
        for index in range(files):
            part = lines[index * count // files : (index + 1) * count // files]
            write(arguments.output / "quickstart" / task / f"part_{index}.jsonl", "".join(part))

    tokenizer = train_tokenizer(conversations)
    write_json(arguments.output / "model" / "tokenizer.json", json.loads(tokenizer.to_str()))
    write_json(arguments.output / "model" / "tokenizer_config.json", tokenizer_config())
    write_json(arguments.output / "model" / "config.json", model_config(tokenizer))


if __name__ == "__main__":
    main()
