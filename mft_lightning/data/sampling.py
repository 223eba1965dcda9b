"""How often each task is drawn: every conversation once an epoch, or at rates that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, floor, inf, log
from typing import Any

import numpy as np

from mft_lightning.data.tasks import in_task_order
from mft_lightning.errors import UserError

KEY = "data.task_sampling"
_PASSES = 2  # a word of the seeds here that no other draw of the plan has
_BLOCK = 1 << 16  # draws that one seed shuffles, so that a small task seen many times takes few of them


@dataclass(frozen=True)
class TaskSampling:
    """How ``data.task_sampling`` was set: at most one of the two, and neither for ``proportional``.

    Attributes:
        temperature: a task with ``n`` conversations is drawn in proportion to ``n ** (1 / temperature)``.
        rates: by task name; a task is drawn in proportion to its rate.
    """

    temperature: float | None = None
    rates: dict[str, float] | None = None

    @property
    def setting(self) -> str | dict[str, float]:
        """As it can be written in a config."""
        if self.temperature is not None:
            return {"temperature": self.temperature}
        return self.rates or "proportional"

    def draws(self, tasks: np.ndarray, names: Sequence[str], seed: int) -> TaskDraws | None:
        """What is drawn from training conversations of these task numbers; None where it is each of them once.

        Every task has at least one draw, and all of them together as many as there are conversations.

        Raises:
            UserError: a rate so small that an epoch would see nothing of its task.
        """
        if self.temperature is None and self.rates is None:
            return None
        counts = np.bincount(tasks, minlength=len(names)).tolist()
        per_epoch = _largest_remainders(self._shares(counts, names), len(tasks))
        if missing := [name for name, draws in zip(names, per_epoch, strict=True) if draws == 0]:
            raise UserError(
                f"{KEY}: {self.setting} draws nothing of {', '.join(missing)} in an epoch of {len(tasks):,} "
                "conversations. Raise the rate, or leave the task out of data.data_paths."
            )
        members = np.split(np.argsort(tasks, kind="stable").astype(np.int32), np.cumsum(counts)[:-1])
        return TaskDraws(members=tuple(members), per_epoch=tuple(per_epoch), seed=seed)

    def _shares(self, counts: list[int], names: Sequence[str]) -> list[float]:
        if self.rates is not None:
            highest = max(self.rates.values())  # divided out, because a sum of rates may be too large for a float
            scores = [self.rates[name] / highest for name in names]
        else:
            assert self.temperature is not None
            largest = max(counts)  # divided out, because a power of a count may be too large for a float
            scores = [exp(log(count / largest) / self.temperature) for count in counts]
        return [score / sum(scores) for score in scores]


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskDraws:
    """Each task as an endless stream of passes over its conversations, of which every epoch takes the next draws.

    So all conversations of a task are seen equally often, or once more than others, at any time.

    Attributes:
        members: of each task, its conversations: indices, ``int32 [n_k]``.
        per_epoch: draws of each task in an epoch.
        seed: of the shuffles; every pass has its own.
    """

    members: tuple[np.ndarray, ...]
    per_epoch: tuple[int, ...]
    seed: int

    def drawn(self, epoch: int) -> np.ndarray:
        """The conversations of an epoch, task after task: indices, ``int32 [draws]``."""
        return np.concatenate([self._of_task(task, epoch) for task in range(len(self.members))])

    def _of_task(self, task: int, epoch: int) -> np.ndarray:
        members, draws = self.members[task], self.per_epoch[task]
        passes = max(1, _BLOCK // len(members))
        block = passes * len(members)
        start = epoch * draws
        first, last = start // block, (start + draws - 1) // block
        stream = [self._passes(task, passes, number) for number in range(first, last + 1)]
        return np.concatenate(stream)[start - first * block :][:draws]

    def _passes(self, task: int, passes: int, block: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, task, block, _PASSES])
        members = self.members[task]
        if passes == 1:
            return rng.permutation(members)
        return rng.permuted(np.tile(members, (passes, 1)), axis=1).ravel()

    def resized(self, total: int) -> TaskDraws:
        """With this many draws in an epoch at the same rates, and still one of every task at least."""
        shares = [draws / sum(self.per_epoch) for draws in self.per_epoch]
        per_epoch = tuple(max(1, draws) for draws in _largest_remainders(shares, total))
        return replace(self, per_epoch=per_epoch)

    def typical(self, values: np.ndarray) -> np.ndarray:
        """Values of conversations as a typical epoch has them: of each task evenly over its order, ``[draws]``."""
        parts = []
        for members, draws in zip(self.members, self.per_epoch, strict=True):
            places = (2 * np.arange(draws) + 1) * len(members) // (2 * draws)
            parts.append(np.sort(values[members])[places])
        return np.concatenate(parts)


def parse_task_sampling(setting: Any, names: Sequence[str]) -> TaskSampling:
    """``"proportional"``, ``{"temperature": T}``, or a rate for each task: by name, or a list in the tasks' order.

    Raises:
        UserError: anything else, a task without a rate or unknown, or a number that is not positive and finite.
    """
    if setting == "proportional":
        return TaskSampling()
    if isinstance(setting, dict) and set(setting) == {"temperature"}:
        if not _positive(setting["temperature"]):
            raise UserError(f"{KEY}: {setting['temperature']!r} is no temperature. Give a positive number.")
        return TaskSampling(temperature=float(setting["temperature"]))
    if isinstance(setting, dict):
        values = in_task_order(setting, names, KEY, "rate", ", or {temperature: T} alone")
    elif isinstance(setting, list | tuple):
        values = list(setting)
    else:
        raise UserError(
            f"{KEY}: {setting!r} is neither proportional nor {{temperature: T}} nor one rate for each of "
            f"{', '.join(names)}."
        )
    if len(values) != len(names) or not all(_positive(value) for value in values):
        raise UserError(f"{KEY}: {setting} is not one positive number for each of {', '.join(names)}.")
    return TaskSampling(rates={name: float(value) for name, value in zip(names, values, strict=True)})


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < inf


def _largest_remainders(shares: list[float], total: int) -> list[int]:
    """``total`` in whole parts as near to ``shares`` as can be; of equal remainders the first is rounded up."""
    # Rounded, because the last bits of a power may differ from one machine to the next.
    quotas = [round(share * total, 6) for share in shares]
    parts = [floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(parts)), key=lambda task: parts[task] - quotas[task])
    for task in by_remainder[: total - sum(parts)]:
        parts[task] += 1
    return parts
