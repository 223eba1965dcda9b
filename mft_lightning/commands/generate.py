"""``generate``: ask a checkpoint, full or LoRA, through the encoder that trained it: one prompt, or a file of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mft_lightning.commands.asking import (
    add_generation_options,
    add_model_options,
    check_model_options,
    check_text,
    generation_settings,
    load_asked,
)
from mft_lightning.commands.loading import LoadedModel
from mft_lightning.data.lines import read_lines
from mft_lightning.data.records import BadRecord, Question, Turn, parse_question
from mft_lightning.errors import UserError
from mft_lightning.key_errors import parse
from mft_lightning.model.generation import Answer, GenerationSettings, answer, room
from mft_lightning.paths import given_path
from mft_lightning.quiet import quieten
from mft_lightning.screen import print_json, reader_may_leave

WINDOW = 8  # batches that are sorted by length together, so that little is padding and answers still come in order


@dataclass(frozen=True)
class Asked:
    """A question, where it stands, and its encoded prompt."""

    where: str
    line: int
    question: Question
    prompt: list[int]


def generate(argv: list[str]) -> None:
    """Print the answer to ``--prompt``, or a JSON object for every conversation of ``--input``, and nothing else."""
    quieten()
    options, settings = _options(argv)
    questions = _read_questions(options)
    loaded = load_asked(options)
    asked = [_encoded(loaded, *question) for question in questions]
    with reader_may_leave():
        for question, found in _answers(loaded, asked, settings, options.batch_size):
            if options.prompt is not None:
                print(loaded.chat_format.decode(found.ids))
            else:
                print_json(_as_object(loaded, question, found))


def _options(argv: list[str]) -> tuple[Namespace, GenerationSettings]:
    parser = ArgumentParser(prog="python -m mft_lightning generate", exit_on_error=False)
    parser.add_argument("--prompt", type=str, help="What the human says.")
    parser.add_argument("--system", type=str, help="A system turn in front of --prompt.")
    parser.add_argument(
        "--input",
        type=str,
        help="JSONL of conversations, in any form that training reads. One that ends with a human turn is answered; of "
        "one that ends with a bot turn, that turn is asked for again and printed as the reference.",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="Conversations of --input answered side by side.")
    add_model_options(parser)
    add_generation_options(parser)
    options = parse(parser, argv)
    settings = generation_settings(options)
    if (options.prompt is None) == (options.input is None):
        raise UserError("generate: give either --prompt TEXT or --input FILE.jsonl.")
    if options.system is not None and options.prompt is None:
        raise UserError("--system: goes with --prompt. In --input write it as the conversation's system turn.")
    if options.batch_size < 1:
        raise UserError(f"--batch_size: {options.batch_size} is less than 1.")
    check_model_options(options)
    check_text(options, "prompt", "system")
    return options, settings


def _read_questions(options: Namespace) -> list[tuple[str, int, Question]]:
    """(where, line number, question) of everything that is asked, read before any model is loaded."""
    if options.prompt is not None:
        system = [] if options.system is None else [Turn("system", options.system)]
        return [("--prompt", 1, Question((*system, Turn("human", options.prompt))))]
    questions = []
    for line in read_lines(given_path(options.input, "--input")):
        where = f"{line.file}:{line.number}"
        try:
            questions.append((where, line.number, parse_question(line.raw)))
        except BadRecord as error:
            raise UserError(f"{where}: {error.detail} [{error.reason}]. Mend the line, or take it out.") from error
    if not questions:
        raise UserError(f"--input {options.input}: holds no conversation.")
    return questions


def _encoded(loaded: LoadedModel, where: str, line: int, question: Question) -> Asked:
    prompt = loaded.chat_format.encode_prompt(question.turns)
    left = room(loaded.model, prompt)
    if left is not None and left < 1:
        raise UserError(f"{where}: has {len(prompt)} tokens; the model has {len(prompt) + left} positions. Shorten it.")
    return Asked(where, line, question, prompt)


def _answers(
    loaded: LoadedModel, asked: Sequence[Asked], settings: GenerationSettings, batch_size: int
) -> Iterator[tuple[Asked, Answer]]:
    """Every question with its answer, in order."""
    size = WINDOW * batch_size
    windows = [asked[i : i + size] for i in range(0, len(asked), size)]
    screen = Console(stderr=True)
    shown = screen.is_terminal and not sys.stdout.isatty()  # on a terminal the answers themselves tell how far it is
    # rich would take what is printed meanwhile, the answers, for the terminal, wherever standard output goes
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=screen, transient=True, disable=not shown, redirect_stdout=False)
    with bar:
        task = bar.add_task("answering", total=len(asked))
        for window in windows:
            found = _answered(loaded, window, settings, batch_size, lambda count: bar.advance(task, count))
            yield from zip(window, found, strict=True)


def _answered(
    loaded: LoadedModel,
    window: Sequence[Asked],
    settings: GenerationSettings,
    batch_size: int,
    tell: Callable[[int], None],
) -> list[Answer]:
    """The answers of a window, in order; ``tell`` hears of every batch how many it was."""
    order = sorted(range(len(window)), key=lambda i: len(window[i].prompt))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = answer(loaded.model, loaded.tokenizer, [window[i].prompt for i in chosen], settings)
        found |= dict(zip(chosen, batch, strict=True))
        tell(len(chosen))
    return [found[i] for i in range(len(window))]


def _as_object(loaded: LoadedModel, asked: Asked, found: Answer) -> dict[str, Any]:
    """What is printed of one conversation; ``finish_reason`` is ``stop`` at the eos token, ``length`` at the limit."""
    about: dict[str, Any] = {
        "line": asked.line,
        "prompt": asked.question.turns[-1].content,
        "answer": loaded.chat_format.decode(found.ids),
        "finish_reason": "stop" if found.finished else "length",
    }
    if asked.question.reference is not None:
        about["reference"] = asked.question.reference
    return about
