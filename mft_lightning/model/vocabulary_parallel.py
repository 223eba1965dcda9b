"""A head whose vocabulary is shared out over several devices: what each token's loss needs of all its logits.

Each device has the logits of its own rows of the head and tells the others five numbers of every token; from these
each makes the same loss, and goes on with its own logits to their gradient. A softmax over parts is that of flash
attention (https://arxiv.org/abs/2205.14135, section 3.1) and of Megatron-LM (https://arxiv.org/abs/1909.08053).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor


def is_shared(head: nn.Module) -> bool:
    """Whether a head's vocabulary is shared out over devices, as it is seen inside a forward pass."""
    return isinstance(getattr(head, "weight", None), DTensor)


class LogitSums(NamedTuple):
    """What is known of the logits of ``P`` tokens, each ``[P, 1]``.

    Attributes:
        highest: logit.
        likeliest: token that has it, ``int64``; the first of several.
        total: sum of the exponentials of what each logit is above ``highest``.
        of_target: the target's logit.
        added: sum of all logits.
    """

    highest: Tensor
    likeliest: Tensor
    total: Tensor
    of_target: Tensor
    added: Tensor


@dataclass(frozen=True)
class VocabularyPart:
    """The rows of a head that are on this device: some of them, or all.

    Attributes:
        first: token of the first of them.
        count: of them.
        size: of the whole vocabulary.
        group: of processes that share it; None where all is here.
    """

    first: int
    count: int
    size: int
    group: Any = None

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """That of a head's weight, of which each device has as many rows."""
        size = weight.shape[0]
        if not isinstance(weight, DTensor):
            return cls(0, size, size)
        mesh, count = weight.device_mesh, weight.to_local().shape[0]
        return cls(mesh.get_local_rank() * count, count, size, mesh.get_group())

    def places(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of targets, and whether they are here; that of one which is not means nothing."""
        rows = targets - self.first
        here = (rows >= 0) & (rows < self.count)
        return torch.where(here, rows, 0), here

    def over_all(self, own: LogitSums) -> LogitSums:
        """Those of the whole vocabulary, the same on every device.

        Args:
            own: of the rows here, tokens counted from the first of these, the logit of a target that is elsewhere 0.
        """
        if self.group is None:
            return own
        mine = torch.cat([*own._replace(likeliest=own.likeliest + self.first)], dim=1)  # exact: tokens are < 2 ** 24
        parts = mine.new_empty(dist.get_world_size(self.group) * mine.numel())
        dist.all_gather_single(parts, mine.flatten(), group=self.group)
        highest, likeliest, total, of_target, added = parts.view(-1, *mine.shape).unbind(-1)  # [parts, P] each
        top, where = highest.max(0)
        return LogitSums(
            highest=top[:, None],
            likeliest=likeliest.gather(0, where[None]).T.long(),
            total=(total * (highest - top).exp()).sum(0)[:, None],
            of_target=of_target.sum(0)[:, None],
            added=added.sum(0)[:, None],
        )

    def sum(self, part: Tensor) -> None:
        """Add up, in place, what every device has a summand of."""
        if self.group is not None:
            dist.all_reduce(part, group=self.group)
