"""Guidance: each class wraps a denoiser and is a denoiser.

Predictions are affine in each other at one ``x_t``, so each formula has the same effect for noise,
data, v and velocity. Only the prediction is guided; a learned variance stays the conditional one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.types import Condition, DenoiserFunction

_ROUNDING = 1e-6


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """``u + scale (c - u)`` (arXiv 2207.12598, equation 6, with its w + 1 as ``scale``): 1 is no
    guidance.

    Both predictions come from one call on a doubled batch. ``null`` is the condition of no caption,
    for as many clips as the batch holds. ``rescale`` is the share of ``rescaled`` in the result.
    ``guided_channels`` limits guidance to the first so many channels; ``None`` is all of the
    latents'.
    """

    denoiser: DenoiserFunction
    null: Condition
    scale: float
    rescale: float = 0.0
    guided_channels: int | None = None

    def __call__(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b *n"], condition: Condition
    ) -> Float[Tensor, "b out f h w"]:
        if self.scale == 1:
            return self.denoiser(x_t, t, condition)
        both = self.denoiser(
            torch.cat([x_t, x_t]), torch.cat([t, t]), Condition.cat(condition, self.null)
        )
        conditional, unconditional = both.chunk(2)
        c = self.guided_channels or x_t.shape[1]
        guided = unconditional[:, :c] + self.scale * (conditional[:, :c] - unconditional[:, :c])
        if self.rescale:
            guided = rescaled(guided, conditional[:, :c], self.rescale)
        return torch.cat([guided, conditional[:, c:]], dim=1)


def rescaled(
    guided: Float[Tensor, "b c f h w"], conditional: Float[Tensor, "b c f h w"], share: float
) -> Float[Tensor, "b c f h w"]:
    """Rescale a guided prediction to the conditional's standard deviation, by ``share`` of the way
    (arXiv 2305.08891, equations 15 and 16): large scales overexpose otherwise.
    """
    wanted, found = (x.flatten(1).std(1)[:, None, None, None, None] for x in (conditional, guided))
    return share * guided * (wanted / found) + (1 - share) * guided


@dataclass(frozen=True)
class GuidanceInterval:
    """Guidance between two times only, both included (arXiv 2404.07724); outside of them the
    denoiser alone.
    """

    guided: DenoiserFunction
    denoiser: DenoiserFunction
    start: float
    end: float

    def __post_init__(self) -> None:
        check_interval("interval", (self.start, self.end))

    def __call__(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b *n"], condition: Condition
    ) -> Float[Tensor, "b out f h w"]:
        # Known tokens have smaller times: the largest one is that of the sampler. It may be
        # off by the rounding of float32.
        active = self.start - _ROUNDING <= float(t.max()) <= self.end + _ROUNDING
        return (self.guided if active else self.denoiser)(x_t, t, condition)


def check_interval(name: str, interval: Sequence[float]) -> None:
    """Raise ``ValueError`` unless the interval is two times in order."""
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(
            f"{name} = {','.join(f'{time:g}' for time in interval)}: must be two times with a "
            "comma between, 0 <= LOW <= HIGH <= 1 (0 is data, 1 is noise)"
        )


@dataclass(frozen=True)
class Autoguidance:
    """Autoguidance, ``w + scale (d - w)``, away from a weaker network under the same condition
    (arXiv 2406.02507, equation 3).

    The weaker network is smaller, or trained for less time.
    """

    denoiser: DenoiserFunction
    weaker: DenoiserFunction
    scale: float

    def __call__(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b *n"], condition: Condition
    ) -> Float[Tensor, "b out f h w"]:
        strong = self.denoiser(x_t, t, condition)
        if self.scale == 1:
            return strong
        c = x_t.shape[1]
        weak = self.weaker(x_t, t, condition)[:, :c]
        return torch.cat([weak + self.scale * (strong[:, :c] - weak), strong[:, c:]], dim=1)


@dataclass(frozen=True)
class TwoConditionGuidance:
    """``u + s_I (i - u) + s_T (c - i)`` (InstructPix2Pix, arXiv 2211.09800, equation 3).

    ``c`` is conditioned on image and text, ``i`` on the image alone, ``u`` on neither.
    ``with_image`` and ``without_image`` are the same network with and without the image. With both
    scales at 1 the result is ``with_image`` under the text.
    """

    with_image: DenoiserFunction
    without_image: DenoiserFunction
    null: Condition
    image_scale: float
    text_scale: float

    def __call__(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b *n"], condition: Condition
    ) -> Float[Tensor, "b out f h w"]:
        full = self.with_image(x_t, t, condition)
        image = self.with_image(x_t, t, self.null)
        neither = self.without_image(x_t, t, self.null)
        c = x_t.shape[1]
        guided = neither[:, :c] + self.image_scale * (image - neither)[:, :c]
        return torch.cat([guided + self.text_scale * (full - image)[:, :c], full[:, c:]], dim=1)
