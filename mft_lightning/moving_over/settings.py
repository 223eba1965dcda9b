"""What ``--set`` gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mft_lightning.errors import UserError, nearest


class Settings(Mapping[str, str]):
    """Variables that are given from outside, by name. It remembers which names were asked for.

    Args:
        given: their values.
    """

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = dict(given)
        self._asked: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self._asked.add(name)
        return self._given[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def check_asked(self, file: str) -> None:
        """Refuse what nothing has asked for.

        Args:
            file: that was read, for the message.

        Raises:
            UserError: there is such a variable.
        """
        for name in self._given:
            if name not in self._asked:
                raise UserError(
                    f"--set {name}: nothing in {file} asks for it.{nearest(name, self._asked, 0.75)} Leave it out, or "
                    "give another."
                )
