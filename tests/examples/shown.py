"""The commands that README.md and the pages of docs/ show: in blocks, behind pipes, and within sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator

PROGRAMS = (
    *("python", "torchrun", "srun", "sbatch", "pip", "tensorboard", "mkdocs", "curl", "vllm", "lm_eval"),
    "text-generation-launcher",
)
COMMAND = rf"(?!python -m( mft_lightning)?$)(\S+/bin/)?({'|'.join(PROGRAMS)}) \S"
SHELL = r"(mkdir|echo|printf|exit|code=|case |#)"  # what is around them in a script


class Unknown(ValueError):
    """A line of a script that begins with no program that is known here."""


def commands(text: str) -> Iterator[str]:
    """Continued lines are joined; comments, and the brackets of what is optional, are gone.

    Raises:
        Unknown: for a line of a block of bash whose program is not known.
    """
    for line in _lines(_blocks(text, "bash|sh")):
        if not (found := list(_commands(line))) and not re.match(SHELL, line):
            raise Unknown(line)
        yield from found
    indented = re.findall(r"(?<=\n\n)((?: {4}[^\n]*\n)+)", text)  # with options on lines of their own
    for line in _lines([*_blocks(text, "text"), *(re.sub(r"\n +(?=\[--)", " ", block) for block in indented)]):
        yield from _commands(line)
    for found in re.findall(r"`([^`]+)`", re.sub(r"(?ms)^```.*?^```$", "", text)):
        yield from _commands(" ".join(found.split()))


def _blocks(text: str, languages: str) -> list[str]:
    return re.findall(rf"^```(?:{languages})\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _lines(blocks: list[str]) -> Iterator[str]:
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if text := re.sub(r"(^| )# .*", "", " ".join(line.split())):
                yield text


def _commands(line: str) -> Iterator[str]:
    for part in re.split(r" \| | && ", line):
        if re.match(COMMAND, part):
            yield re.sub(r"\[(--[^\]]*)\]", r"\1", part)
