"""Self-conditioning: a network sees its own earlier estimate of the data (arXiv 2208.04202;
W.A.L.T, arXiv 2312.06662).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from sora_lightning.diffusion.paths import broadcast_time
from sora_lightning.diffusion.predictions import Process
from sora_lightning.layers.patch import Patch
from sora_lightning.types import Condition, Latents, PackedLatents, dense_groups, from_groups


def estimate_x_0(
    process: Process,
    patch: Patch,
    output: Float[Tensor, "b out f h w"],
    inputs: Float[Tensor, "b c f h w"],
    t: Float[Tensor, " b *n"],
) -> Float[Tensor, "b c f h w"]:
    """Return the data that an output implies at a network's inputs, without gradient.

    ``t`` holds a time for each clip or each token. Tokens at time 0 are data already.
    """
    if t.ndim == 2:
        of_positions = repeat(t, "b n -> b n p", p=patch.volume)
        t = patch.unpatchify(of_positions, patch.grid(*inputs.shape[2:]))  # b 1 f h w
    x_t = inputs / process.inputs(torch.ones_like(inputs), t)
    x_0 = process.to_x0_and_noise(output, x_t, t).x_0
    return torch.where(broadcast_time(t, x_t) == 0, x_t, x_0).detach()


def with_own_estimate(
    denoiser: Callable[..., Any],
    process: Process,
    patch: Patch,
    chosen: Bool[Tensor, " b"] | None = None,
) -> Callable[[Latents, Tensor, Condition], Latents]:
    """Return a denoiser of which the ``chosen`` clips, or all, see the estimate of a first call.

    No gradient runs through that call. The other clips see zeros.
    """

    def predict(x_t: Latents, t: Tensor, condition: Condition) -> Latents:
        with torch.no_grad():
            output = denoiser(x_t, t, condition)
        # Autocast would use the weights that it cast without a gradient once more.
        torch.clear_autocast_cache()
        groups = dense_groups(x_t)
        rows = zip(dense_groups(output), groups, _times(t, x_t, patch), strict=True)
        estimates = [estimate_x_0(process, patch, *row) for row in rows]
        if chosen is not None:
            masks = chosen.split([len(x) for x in groups])
            estimates = [
                torch.where(rearrange(mask, "b -> b 1 1 1 1"), estimate, 0)
                for mask, estimate in zip(masks, estimates, strict=True)
            ]
        return denoiser(x_t, t, condition, from_groups(estimates, x_t))

    return predict


def _times(t: Float[Tensor, "*times"], x_t: Latents, patch: Patch) -> list[Float[Tensor, "..."]]:
    """Return the times of each dense group."""
    if not isinstance(x_t, PackedLatents):
        return [t]
    if len(t) == len(x_t):
        return list(t.split(1))
    num_tokens = [patch.grid(*clip.shape[1:]).num_tokens for clip in x_t.clips]
    return [of_clip[None] for of_clip in t.split(num_tokens)]


@dataclass
class SelfConditioned:
    """A denoiser for one sampling run that sees the estimate of its call one step before.

    Guidance goes around it. A step is known by its time; where guidance calls several times at one
    step, each call sees the estimate of the same call.
    """

    denoiser: Callable[..., Tensor]
    process: Process
    patch: Patch
    _time: float | None = None
    _call: int = 0
    _estimates: dict[int, Tensor] = field(default_factory=dict)

    def __call__(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b *n"], condition: Condition
    ) -> Float[Tensor, "b out f h w"]:
        # Known tokens have earlier times: the largest time is that of the sampler.
        time = float(t.max())
        self._call = 0 if time != self._time else self._call + 1
        self._time = time
        estimate = self._estimates.get(self._call, self._estimates.get(0))
        if estimate is not None and len(estimate) != len(x_t):
            # Guidance has begun or ended: its batch holds the conditional clips first.
            estimate = estimate.repeat(-(-len(x_t) // len(estimate)), 1, 1, 1, 1)[: len(x_t)]
        output = self.denoiser(x_t, t, condition, estimate)
        self._estimates[self._call] = estimate_x_0(self.process, self.patch, output, x_t, t)
        return output
