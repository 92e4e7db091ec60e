"""Known latents: they have a diffusion time of their own, by default 0, while the others are
denoised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor

from sora_lightning.diffusion.paths import broadcast_time
from sora_lightning.diffusion.predictions import Process
from sora_lightning.layers.patch import Patch
from sora_lightning.types import Condition, DenoiserFunction


@dataclass(frozen=True)
class Known:
    """A mask of known latent positions, in whole tokens, and the diffusion time that each clip's
    are seen at: 0, or above if noise is added to them.
    """

    mask: Bool[Tensor, "b 1 f h w"]
    t: Float[Tensor, " b"]
    patch: Patch

    @classmethod
    def of(
        cls, mask: Bool[Tensor, "b 1 f h w"], patch: Patch, t: Float[Tensor, " b"] | None = None
    ) -> Known:
        """Return the tokens that ``mask`` covers whole; one covered in part counts as unknown."""
        f, h, w = mask.shape[2:]
        whole = patch.patchify(mask.float()).amin(-1, keepdim=True)
        known = patch.unpatchify(whole.expand(-1, -1, patch.volume), patch.grid(f, h, w))
        return cls(known > 0, torch.zeros(len(mask), device=mask.device) if t is None else t, patch)

    @property
    def tokens(self) -> Bool[Tensor, "b n"]:
        return self.patch.patchify(self.mask.float())[..., 0] > 0

    def place(
        self, x: Float[Tensor, "b c f h w"], known: Float[Tensor, "b c f h w"]
    ) -> Float[Tensor, "b c f h w"]:
        """Return ``known`` at known positions and ``x`` elsewhere."""
        return torch.where(self.mask, known, x)

    def times(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b n"]:
        """Return the time of each token."""
        return torch.where(self.tokens, self.t[:, None].to(t), t[:, None])

    def repeat(self, times: int) -> Known:
        """Return the same for a batch that repeats the clips."""
        return Known(self.mask.repeat(times, 1, 1, 1, 1), self.t.repeat(times), self.patch)

    def insert(
        self,
        process: Process,
        inputs: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b"],
        x_0: Float[Tensor, "b c f h w"],
        noise: Float[Tensor, "b c f h w"],
    ) -> tuple[Float[Tensor, "b c f h w"], Float[Tensor, "b n"]]:
        """Return a network's inputs with the known latents at their own time, and the time of each
        token.
        """
        known = process.path.perturb(x_0, noise, self.t)
        return self.place(inputs, process.inputs(known, self.t)), self.times(t)


def mean_where(
    values: Float[Tensor, "b c f h w"], mask: Bool[Tensor, "b 1 f h w"] | None
) -> Float[Tensor, " b"]:
    """Return each clip's mean over where the mask is true; 0 where it is true nowhere.

    ``None`` is true everywhere.
    """
    if mask is None:
        return values.flatten(1).mean(1)
    weights = mask.to(values.dtype).expand_as(values)
    total = reduce(values * weights, "b c f h w -> b", "sum")
    return total / reduce(weights, "b c f h w -> b", "sum").clamp(min=1)


@dataclass(frozen=True)
class ReplaceKnown:
    """A denoiser whose prediction at known positions is that of the known data.

    Any sampler then moves straight to them.
    """

    denoiser: DenoiserFunction
    process: Process
    known: Known
    x_0: Float[Tensor, "b c f h w"]

    def __call__(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b out f h w"]:
        output = self.denoiser(x_t, t, condition)
        c = self.x_0.shape[1]
        kept = self.known.place(output[:, :c], self._output(x_t, t))
        return torch.cat([kept, output[:, c:]], dim=1)

    def _output(
        self, inputs: Float[Tensor, "b c f h w"], t: Float[Tensor, " b"]
    ) -> Float[Tensor, "b c f h w"]:
        """Return the output that implies the known data at these inputs."""
        path = self.process.path
        x_t = inputs / self.process.inputs(torch.ones_like(inputs), t)
        alpha, sigma = (broadcast_time(f(t), x_t) for f in (path.alpha, path.sigma))
        return self.process.target(self.x_0, (x_t - alpha * self.x_0) / sigma, t)
