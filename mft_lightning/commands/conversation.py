"""A conversation with a model: its turns, the next answer, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mft_lightning.aside import written_aside
from mft_lightning.commands.loading import LoadedModel
from mft_lightning.data.records import Turn
from mft_lightning.errors import UserError
from mft_lightning.model.generation import GenerationSettings, room
from mft_lightning.model.replying import reply
from mft_lightning.screen import json_line, shown

TAKEN_BACK = "Your words are taken back."


@dataclass(frozen=True)
class Round:
    """What was said and what was answered: the ids of the answer as the model gave them, and whether it ended it."""

    said: Turn
    answer: Turn
    ids: list[int]
    finished: bool


class Talk:
    """Asks a model turn by turn, each after all turns before it.

    The history is encoded as in training, with the ids of the model's answers as it gave them.

    Args:
        loaded: the model.
        settings: how it answers.
        system: what it is told in front of everything.

    Attributes:
        rounds: all of it but the system turn. It is replaced as a whole, so that no interrupt leaves a part of one.
    """

    def __init__(self, loaded: LoadedModel, settings: GenerationSettings, system: str | None) -> None:
        self.loaded, self.settings, self.system = loaded, settings, system
        self.rounds: tuple[Round, ...] = ()

    def start_anew(self) -> None:
        """Forget all turns but the system's."""
        self.rounds = ()

    def say(self, text: str, *, tell: Callable[[str], None], stopped: Callable[[], bool]) -> str | None:
        """Say ``text`` and tell the answer as it comes. It counts as far as it was told, if it was stopped too.

        Returns:
            Why the answer is not whole; None if it is.

        Raises:
            UserError: no answer can be had, or it is empty. Nothing of it is kept, nor what was said.
        """
        model, chat_format = self.loaded.model, self.loaded.chat_format
        said = Turn("human", text)
        prompt = chat_format.encode_prompt([*self._turns(), said], [each.ids for each in self.rounds])
        left = room(model, prompt)
        if left is not None and left < 1:
            raise UserError(
                f"the conversation has {len(prompt):,} tokens by now, and the model has {len(prompt) + left:,} "
                f"positions. {TAKEN_BACK} /reset starts anew."
            )
        found = reply(model, self.loaded.tokenizer, prompt, self.settings, tell=tell, stopped=stopped)
        answer = chat_format.decode(found.ids)
        if not answer:
            raise UserError(f"the answer is empty. {TAKEN_BACK}")
        self.rounds += (Round(said, Turn("bot", answer), found.ids, found.finished),)
        if found.finished:
            return None
        if stopped():
            return "stopped; what stands there counts as the answer"
        if left == len(found.ids):
            return f"cut: the model's {len(prompt) + left:,} positions are full. /reset starts anew"
        return f"cut at --max_new_tokens {self.settings.max_new_tokens}"

    def save(self, file: Path, *, overwrite: bool) -> str:
        """Write the conversation as a line of training data.

        Returns:
            What to say of it.

        Raises:
            UserError: there is nothing to write, the file is there already, or cannot be written.
        """
        if not self.rounds:
            raise UserError("/save: nothing has been said yet.")
        if file.exists() and not overwrite:
            raise UserError(f"/save: {shown(file)} is there already. Replace it by /save! FILE, or name another.")
        rounds = [{"role": turn.role, "content": turn.content} for turn in self._turns()]
        try:
            with written_aside(file) as aside:
                aside.write_text(json_line({"chat_rounds": rounds}) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"/save: {shown(file)} cannot be written ({error.strerror}).") from error
        cut = [str(number) for number, each in enumerate(self.rounds, start=1) if not each.finished]
        told = f"; answer {', '.join(cut)} is not whole: mend it before you train on it" if cut else ""
        return f"saved to {shown(file)}{told}"

    def _turns(self) -> list[Turn]:
        front = [] if self.system is None else [Turn("system", self.system)]
        return [*front, *(turn for each in self.rounds for turn in (each.said, each.answer))]
