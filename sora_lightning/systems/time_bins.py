"""The validation loss by diffusion time: which noise levels a model has learned to remove."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from sora_lightning.systems.draws import GroupDraws, make_rng
from sora_lightning.types import PackedLatents

NUM_BINS = 8
# The ends of time are left out: some weightings have no value there.
_MARGIN = 1e-3


class LossPerTime(Metric):
    """Mean loss of the clips whose times lie in each of ``num_bins`` equal parts of [0, 1].

    Sums are gathered over ranks in double precision. A bin without clips is absent.
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
        # A training in bfloat16 casts the states.
        losses = losses.detach().double()
        self.totals = self.totals.double().index_add(0, bins, losses)
        self.counts = self.counts.double().index_add(0, bins, torch.ones_like(losses))

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return the means by the bins' bounds, say ``0.125-0.25``."""
        return {
            f"{i / self.num_bins:g}-{(i + 1) / self.num_bins:g}": self.totals[i] / self.counts[i]
            for i in range(self.num_bins)
            if self.counts[i] > 0
        }


def fixed_draws(
    clip_ids: Sequence[str], x_0: Float[Tensor, "b c f h w"], seed: int
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b c f h w"]]:
    """Draw a time, uniform over [0, 1], and noise for each clip by its name alone: the same in
    every validation and on any rank.
    """
    rng = GroupDraws([make_rng(x_0.device, seed, name) for name in clip_ids], 1)
    t = rng.uniform().clamp(_MARGIN, 1 - _MARGIN)
    return t, torch.stack(rng.noise(PackedLatents(tuple(x_0))).clips)
