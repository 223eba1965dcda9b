"""Which share of the data is this process's."""

from __future__ import annotations

import lightning as L


def data_parallel_place(trainer: L.Trainer | None) -> tuple[int, int]:
    """This process's rank among those that share out the data, and how many there are.

    Ranks that share one layer's matrices (tensor parallelism) are one of them.
    """
    place = trainer.distributed_sampler_kwargs if trainer is not None else None
    return (place["rank"], place["num_replicas"]) if place is not None else (0, 1)
