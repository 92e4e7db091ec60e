"""Which ranks of a training read clips of their own."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy


def data_ranks(trainer: L.Trainer | None) -> tuple[int, int]:
    """Return this process's rank and the number of ranks among those that read different clips.

    Ranks that share a layer by tensor parallelism read the same clips.
    """
    places = None if trainer is None else trainer.distributed_sampler_kwargs
    return (0, 1) if places is None else (places["rank"], places["num_replicas"])


def require_even(trainer: L.Trainer | None, num_batches: int) -> None:
    """Raise ``ValueError`` where ranks with shares of the parameters would validate on different
    numbers of batches: each batch needs all of them.
    """
    num_ranks = data_ranks(trainer)[1]
    if trainer is None or not num_batches % num_ranks:
        return
    fewest, limit = num_batches // num_ranks, trainer.limit_val_batches
    limited = isinstance(limit, int) and limit <= fewest
    if isinstance(trainer.strategy, ModelParallelStrategy) and not limited:
        raise ValueError(
            f"trainer.limit_val_batches = {limit}: {num_batches} batches of data.val_manifest are "
            f"not a multiple of the {num_ranks} ranks of data_parallel_size, and every rank needs "
            f"as many: give {fewest}, or change data.batching.pixels_per_batch"
        )
