"""Latents that are known: they stand at their own time, by default that of data, while all others
are denoised around them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor

from sora_lightning.diffusion.paths import broadcast_time
from sora_lightning.diffusion.predictions import Process
from sora_lightning.layers.patch import Patch
from sora_lightning.types import Condition, DenoiserFunction, MoreTokens


@dataclass(frozen=True)
class Known:
    """Which latent positions are known, in whole tokens, and the time that each clip's stand at: 0,
    or a little more where they carry noise.
    """

    mask: Bool[Tensor, "b 1 f h w"]
    t: Float[Tensor, " b"]
    patch: Patch

    @classmethod
    def of(
        cls, mask: Bool[Tensor, "b 1 f h w"], patch: Patch, t: Float[Tensor, " b"] | None = None
    ) -> Known:
        """A token that is known in part counts as unknown."""
        f, h, w = mask.shape[2:]
        whole = patch.patchify(mask.float()).amin(-1, keepdim=True)
        spread = patch.unpatchify(whole.expand(-1, -1, patch.volume), patch.grid(f, h, w))
        return cls(
            spread > 0, torch.zeros(len(mask), device=mask.device) if t is None else t, patch
        )

    @property
    def tokens(self) -> Bool[Tensor, "b n"]:
        return self.patch.patchify(self.mask.float())[..., 0] > 0

    def place(
        self, x: Float[Tensor, "b c f h w"], given: Float[Tensor, "b c f h w"]
    ) -> Float[Tensor, "b c f h w"]:
        """``given`` where it is known, ``x`` elsewhere."""
        return torch.where(self.mask, given, x)

    def times(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b n"]:
        """The time of each token."""
        return torch.where(self.tokens, self.t[:, None].to(t), t[:, None])


def mean_where(
    values: Float[Tensor, "b c f h w"], mask: Bool[Tensor, "b 1 f h w"]
) -> Float[Tensor, " b"]:
    """Mean of each clip over where the mask is true; 0 where it is true nowhere."""
    weights = mask.to(values.dtype).expand_as(values)
    total = reduce(values * weights, "b c f h w -> b", "sum")
    return total / reduce(weights, "b c f h w -> b", "sum").clamp(min=1)


@dataclass(frozen=True)
class SeeKnown:
    """A denoiser that sees known latents as they are, at their own time.

    ``x_0`` holds the known latents; ``noise`` is what they carry where ``known.t`` is not 0.
    """

    denoiser: DenoiserFunction
    process: Process
    known: Known
    x_0: Float[Tensor, "b c f h w"]
    noise: Float[Tensor, "b c f h w"]

    def __call__(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b out f h w"]:
        given = self.process.path.perturb(self.x_0, self.noise, self.known.t)
        inputs = self.known.place(x_t, self.process.inputs(given, self.known.t))
        return self.denoiser(inputs, self.known.times(t), condition)


@dataclass(frozen=True)
class TellKnown:
    """A denoiser that is told what is known by channels beside its input, and by tokens beside the
    text where there are any. Guidance may go around it, and double the batch.
    """

    denoiser: DenoiserFunction
    given: Float[Tensor, "b e f h w"]
    tokens: MoreTokens | None = None

    def __call__(
        self, x_t: Float[Tensor, "m c f h w"], t: Float[Tensor, " m *n"], condition: Condition
    ) -> Float[Tensor, "m out f h w"]:
        times = len(x_t) // len(self.given)
        condition = replace(condition, given=self.given.repeat(times, 1, 1, 1, 1))
        if self.tokens is not None:
            tokens, mask = self.tokens
            more = MoreTokens(tokens.repeat(times, 1, 1), mask.repeat(times, 1))
            condition = condition.joined(more)
        return self.denoiser(x_t, t, condition)


@dataclass(frozen=True)
class KeepKnown:
    """A denoiser that answers, where latents are known, that the data are these: any sampler then
    moves straight to them.
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
        kept = self.known.place(output[:, :c], self._answer(x_t, t))
        return torch.cat([kept, output[:, c:]], dim=1)

    def _answer(
        self, inputs: Float[Tensor, "b c f h w"], t: Float[Tensor, " b"]
    ) -> Float[Tensor, "b c f h w"]:
        """The output that says, at these inputs, that the data are the known ones."""
        path = self.process.path
        x_t = inputs / self.process.inputs(torch.ones_like(inputs), t)
        alpha, sigma = (broadcast_time(share(t), x_t) for share in (path.alpha, path.sigma))
        return self.process.target(self.x_0, (x_t - alpha * self.x_0) / sigma, t)
