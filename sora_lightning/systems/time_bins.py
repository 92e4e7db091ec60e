"""The validation loss by diffusion time: which noise a model has learned to remove."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from sora_lightning.systems.draws import make_rng

NUM_BINS = 8
# The ends of time are left out: some weightings have no value there.
_MARGIN = 1e-3


class LossPerTime(Metric):
    """Mean losses of clips whose times lie in each of ``num_bins`` equal parts of [0, 1].

    Sums gather over ranks in double precision, and a bin without clips is absent.
    """

    full_state_update = False
    totals: Tensor
    counts: Tensor

    def __init__(self, num_bins: int = NUM_BINS) -> None:
        super().__init__()
        self.num_bins = num_bins
        for name in ("totals", "counts"):
            zeros = torch.zeros(num_bins, dtype=torch.float64)
            self.add_state(name, default=zeros, dist_reduce_fx="sum")

    def update(self, t: Float[Tensor, " b"], losses: Float[Tensor, " b"]) -> None:
        bins = (t * self.num_bins).long().clamp(max=self.num_bins - 1)
        self.totals.index_add_(0, bins, losses.detach().double())
        self.counts.index_add_(0, bins, torch.ones_like(losses, dtype=torch.float64))

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """By the bin's bounds, say ``0.125-0.25``."""
        return {
            f"{i / self.num_bins:g}-{(i + 1) / self.num_bins:g}": self.totals[i] / self.counts[i]
            for i in range(self.num_bins)
            if self.counts[i] > 0
        }


def fixed_draws(
    clip_ids: Sequence[str], x_0: Float[Tensor, "b c f h w"], seed: int
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b c f h w"]]:
    """A time, uniform over clips, and noise for each clip by its name alone: the same in every
    validation, on whichever rank.
    """
    times, noises = [], []
    for name, latents in zip(clip_ids, x_0, strict=True):
        rng = make_rng(x_0.device, seed, name)
        times.append(torch.rand((), generator=rng, device=x_0.device))
        noises.append(torch.randn(latents.shape, generator=rng, device=x_0.device))
    return torch.stack(times).clamp(_MARGIN, 1 - _MARGIN), torch.stack(noises)
