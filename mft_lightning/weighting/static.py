"""Static task weightings as one coefficient per conversation of a global batch."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

StaticMode = Literal["case1", "case2", "case3", "case4"]
STATIC_MODES: tuple[str, ...] = get_args(StaticMode)


def coefficients(
    mode: str,
    *,
    tasks: Tensor,
    n_supervised: Tensor,
    task_conversations: Tensor,
    task_supervised: Tensor,
    weights: Tensor,
) -> Tensor:
    """The factor ``c_s`` of each conversation's summed NLL, so that the loss is ``sum_s c_s * sum_t nll_t``.

    With ``N_k`` supervised tokens and ``S_k`` conversations of task ``k`` in the global batch, ``N`` and ``S`` their
    sums, ``K_b`` the number of tasks present, ``n_s`` a conversation's supervised tokens and ``w_k`` its task's weight:

    - case1: ``1 / N`` (tokens count alike)
    - case2: ``1 / (S * n_s)`` (conversations count alike)
    - case3: ``w_k / (K_b * N_k)`` (tasks count alike, tokens within a task)
    - case4: ``w_k / (K_b * S_k * n_s)`` (tasks count alike, conversations within a task)

    Balancers move the ``w_k`` of case3 between steps.

    The original divides by the same counts of one rank's micro-batch; over the global batch the loss depends on
    nothing but the conversations in it.

    Args:
        mode: case1 to case4.
        tasks: task numbers of the conversations at hand, ``int64 [C]``.
        n_supervised: their supervised tokens, ``int64 [C]``.
        task_conversations: ``S_k`` of the whole global batch, ``int64 [K]``.
        task_supervised: ``N_k`` of the whole global batch, ``int64 [K]``.
        weights: ``w_k``, of mean 1 over all tasks of the run, ``[K]``.

    Returns:
        ``float64 [C]``.
    """
    present = (task_conversations > 0).sum().to(torch.float64)
    share = weights.to(torch.float64)[tasks] / present
    if mode == "case1":
        return torch.ones_like(share) / task_supervised.sum()
    if mode == "case2":
        return 1.0 / (task_conversations.sum() * n_supervised.to(torch.float64))
    if mode == "case3":
        return share / task_supervised[tasks]
    if mode == "case4":
        return share / (task_conversations[tasks] * n_supervised.to(torch.float64))
    raise ValueError(f"unknown weighting {mode!r}; one of {', '.join(STATIC_MODES)}")
