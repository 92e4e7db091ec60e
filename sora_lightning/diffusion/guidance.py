"""Guidance wraps a denoiser and returns a denoiser: models and samplers know nothing of it.

Predictions are affine in each other at one ``x_t``, so each formula means the same for noise, data,
v and velocity. Only the prediction is guided; a variance learned beside it stays the conditional's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.types import Condition, DenoiserFunction


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


three_channel_guidance = partial(ClassifierFreeGuidance, guided_channels=3)
"""DiT's habit: the fourth channel of its latents is not guided."""


def rescaled(
    guided: Float[Tensor, "b c f h w"], conditional: Float[Tensor, "b c f h w"], share: float
) -> Float[Tensor, "b c f h w"]:
    """Guidance that keeps the conditional's deviation, in this share (arXiv 2305.08891, equations
    15 and 16): large scales overexpose otherwise.
    """
    wanted, found = (x.flatten(1).std(1)[:, None, None, None, None] for x in (conditional, guided))
    return share * guided * (wanted / found) + (1 - share) * guided


@dataclass(frozen=True)
class GuidanceInterval:
    """Guidance between two times only (arXiv 2404.07724), outside of them the denoiser alone."""

    guided: DenoiserFunction
    denoiser: DenoiserFunction
    start: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"start = {self.start} and end = {self.end}: must be times, 0 <= start <= end <= 1"
            )

    def __call__(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b *n"], condition: Condition
    ) -> Float[Tensor, "b out f h w"]:
        # Known tokens stand before the others: the largest time is that of the sampler.
        active = self.start <= float(t.max()) <= self.end
        return (self.guided if active else self.denoiser)(x_t, t, condition)


@dataclass(frozen=True)
class Autoguidance:
    """``w + scale (d - w)`` away from what a weaker network says under the same condition (arXiv
    2406.02507, equation 3): smaller, or trained for less time.
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
class GuidanceRecipe:
    """How a sampling run is guided by text, of the parts above; without arguments it is
    ``ClassifierFreeGuidance``. ``interval`` holds the times between which guidance acts.
    """

    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    guided_channels: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale = {self.rescale}: must lie in [0, 1]")
        if self.guided_channels is not None and self.guided_channels < 1:
            raise ValueError(f"guided_channels = {self.guided_channels}: must be at least 1")
        start, end = self.interval
        if not 0 <= start <= end <= 1:
            raise ValueError(
                f"interval = {start:g}, {end:g}: must be two times, 0 <= start <= end <= 1"
            )

    def __call__(
        self,
        denoiser: DenoiserFunction,
        null: Condition,
        scale: float,
        weaker: DenoiserFunction | None = None,
    ) -> DenoiserFunction:
        """The guided denoiser. A ``weaker`` network, autoguidance's, takes the place of ``null``;
        ``ValueError`` for ``rescale`` or ``guided_channels`` beside one.
        """
        guided: DenoiserFunction
        if weaker is not None:
            if self.rescale or self.guided_channels is not None:
                raise ValueError("rescale and guided_channels are not for a weaker network's guide")
            guided = Autoguidance(denoiser, weaker, scale)
        else:
            guided = ClassifierFreeGuidance(
                denoiser, null, scale, self.rescale, self.guided_channels
            )
        if self.interval == (0, 1):
            return guided
        return GuidanceInterval(guided, denoiser, *self.interval)


@dataclass(frozen=True)
class TwoConditionGuidance:
    """``u + s_I (i - u) + s_T (c - i)`` (InstructPix2Pix, arXiv 2211.09800, equation 3): ``i`` is
    told the image but not the text, ``u`` neither.

    ``with_image`` and ``without_image`` are the same network around the image and without it; each
    scale at 1 is ``with_image`` under the text.
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
