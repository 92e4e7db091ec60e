"""Losses of a denoiser. They are pure: noise and time are passed in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sora_lightning.checks import require_at_least, require_in, require_positive
from sora_lightning.diffusion.known import Known, mean_where
from sora_lightning.diffusion.paths import Transition, VariancePreserving, broadcast_time
from sora_lightning.diffusion.predictions import Coefficients, Process
from sora_lightning.types import Condition, Latents, PackedLatents, dense_groups, from_groups


class Weighting(ABC):
    """Weight of the data's squared error at each time.

    Objectives convert it to a weight of the error of what the network predicts.
    """

    @abstractmethod
    def __call__(self, c: Coefficients) -> Tensor:
        """Return the weight of the data's squared error."""


@dataclass(frozen=True)
class MinSNR(Weighting):
    """``min(SNR, gamma)`` (arXiv 2303.09556, section 3.4)."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        require_positive(gamma=self.gamma)

    def __call__(self, c: Coefficients) -> Tensor:
        return (c.alpha / c.sigma).square().clamp(max=self.gamma)


@dataclass(frozen=True)
class EDMWeighting(Weighting):
    """``(sigma^2 + data_std^2) / (sigma data_std)^2`` (arXiv 2206.00364, table 1; sigma relative to
    alpha^-1 on other paths): the error of ``Preconditioned`` as it is.
    """

    data_std: float = 1.0

    def __call__(self, c: Coefficients) -> Tensor:
        variance = (c.alpha * self.data_std).square() + c.sigma.square()
        return variance / (c.sigma * self.data_std).square()


def add_offset_noise(
    noise: Float[Tensor, "*b c f h w"], shift: Float[Tensor, "*b c f 1 1"], strength: float
) -> Float[Tensor, "*b c f h w"]:
    """Return noise that also shifts the mean of whole frames, by ``strength`` times ``shift``.

    Without it, a model that never sees pure noise keeps every video's mean near that of the data
    (I2VGen-XL, arXiv 2311.04145, trains with 0.1).
    """
    return noise + strength * shift


class Objective(ABC):
    """A loss of what the network predicts on ``process``, for dense batches and for packs.

    ``offset_noise`` is the strength of ``add_offset_noise``; 0 is none. ``self_conditioning`` is
    the share of clips that see their own estimate (``with_own_estimate``).
    """

    process: Process
    offset_noise: float
    self_conditioning: float

    @abstractmethod
    def error(
        self,
        output: Float[Tensor, "b out f h w"],
        x_0: Float[Tensor, "b c f h w"],
        noise: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c f h w"]:
        """Return the loss of each value."""

    def __call__(
        self,
        denoiser: Callable[[Latents, Tensor, Condition], Latents],
        x_0: Latents,
        noise: Latents,
        t: Float[Tensor, " b"],
        condition: Condition,
        known: Sequence[Known | None] | None = None,
    ) -> Float[Tensor, " b"]:
        """Return the loss of each clip at its time ``t``.

        ``known`` holds one ``Known`` for each of the dense groups of ``x_0``. Known latents are
        seen at their own time. The loss is the mean over all that is shown and not known.
        """
        data, noises = dense_groups(x_0), dense_groups(noise)
        masks = [None] * len(data) if known is None else known
        sizes = [len(x) for x in data]
        groups = list(zip(data, noises, t.split(sizes), masks, strict=True))
        seen = [self._inputs(*group) for group in groups]
        times = join_times([times for _, times in seen], x_0)
        output = denoiser(from_groups([x_t for x_t, _ in seen], x_0), times, condition)
        rows = zip(dense_groups(output), groups, loss_masks(x_0, masks), strict=True)
        return torch.cat(
            [mean_where(self.error(y, x, e, t), mask) for y, (x, e, t, _), mask in rows]
        )

    def _inputs(
        self,
        x_0: Float[Tensor, "b c f h w"],
        noise: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b"],
        known: Known | None,
    ) -> tuple[Float[Tensor, "b c f h w"], Float[Tensor, " b *n"]]:
        """Return what the network sees, and the time of each clip or of each token."""
        x_t = self.process.inputs(self.process.path.perturb(x_0, noise, t), t)
        return (x_t, t) if known is None else known.insert(self.process, x_t, t, x_0, noise)


def join_times(times: Sequence[Float[Tensor, "..."]], x_0: Latents) -> Float[Tensor, "..."]:
    """Return the times of dense groups as a denoiser takes them for latents of this kind."""
    if isinstance(x_0, PackedLatents):
        return torch.cat([of_group.flatten() for of_group in times])
    return times[0]


def loss_masks(
    x_0: Latents, known: Sequence[Known | None]
) -> list[Bool[Tensor, "b 1 f h w"] | None]:
    """Return where the loss of each dense group is taken: what is shown and not known.

    ``None`` is everywhere.
    """
    unknown = [None if group is None else ~group.mask for group in known]
    if not isinstance(x_0, PackedLatents) or x_0.shown is None:
        return unknown
    shown = [mask[None, None] for mask in x_0.shown]
    return [a if b is None else a & b for a, b in zip(shown, unknown, strict=True)]


@dataclass(frozen=True)
class SquaredError(Objective):
    """Mean squared error of the prediction. Without ``weighting``, the error of the network's
    output has the same weight at every time.
    """

    process: Process = field(default_factory=Process)
    weighting: Weighting | None = None
    offset_noise: float = 0.0
    self_conditioning: float = 0.0

    def __post_init__(self) -> None:
        require_at_least(0, offset_noise=self.offset_noise)
        require_in("[0, 1]", self_conditioning=self.self_conditioning)

    def error(
        self,
        output: Float[Tensor, "b out f h w"],
        x_0: Float[Tensor, "b c f h w"],
        noise: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c f h w"]:
        c = Coefficients.at(self.process.path, t, x_0)
        target = self.process.prediction.target(x_0, noise, c)
        error = (output[:, : x_0.shape[1]] - target).square()
        if self.weighting is None:
            return error
        return error * self.weighting(c) / self.process.prediction.output_scale(c).square()


@dataclass(frozen=True)
class HybridObjective(SquaredError):
    """Mean squared error, and the variational lower bound for a learned variance (arXiv 2102.09672,
    section 3.1), as DiT trains.

    The network gives twice the channels; the second half interpolates the variance of one of
    ``path.num_steps`` steps between its two bounds. The mean takes no gradient from the bound.
    ``vlb_weight`` is 1 in DiT, whose bound is counted in bits for each value and not multiplied by
    the number of steps.
    """

    vlb_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.process.path, VariancePreserving):
            raise ValueError(
                f"path = {self.process.path}: a learned variance is that of a discrete step; the "
                "path must be a VariancePreserving"
            )

    def error(
        self,
        output: Float[Tensor, "b out f h w"],
        x_0: Float[Tensor, "b c f h w"],
        noise: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c f h w"]:
        c = x_0.shape[1]
        if output.shape[1] != 2 * c:
            raise ValueError(
                f"a prediction of {output.shape[1]} channels: a learned variance needs {2 * c}, "
                "twice those of the latents"
            )
        frozen_mean = torch.cat([output[:, :c].detach(), output[:, c:]], dim=1)
        vlb = self.vlb(frozen_mean, x_0, noise, t)
        return super().error(output, x_0, noise, t) + self.vlb_weight * vlb

    def vlb(
        self,
        output: Float[Tensor, "b two_c f h w"],
        x_0: Float[Tensor, "b c f h w"],
        noise: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c f h w"]:
        """Return the bound in bits for each value.

        It is the divergence of the network's step from the true posterior. At the last step, which
        ends at the data, it is their likelihood in bins of 2 / 255 (arXiv 2006.11239, equation 13).
        """
        path = self.process.path
        assert isinstance(path, VariancePreserving)
        x_t = path.perturb(x_0, noise, t)
        estimate = self.process.to_x0_and_noise(output, x_t, t)
        assert estimate.variance is not None
        s = one_step_before(t, path.num_steps)
        step = Transition.of(path, s, t)
        on_x_0, on_x_t, posterior, beta = (
            broadcast_time(value, x_0).to(x_0)
            for value in (
                step.x_0_coefficient,
                step.x_t_coefficient,
                step.posterior_variance,
                step.beta,
            )
        )
        smallest = _smallest_log_variance(path, s, t, x_0)
        log_variance = interpolated_log_variance(estimate.variance, smallest, beta.log())
        true_mean = on_x_0 * x_0 + on_x_t * x_t
        mean = on_x_0 * estimate.x_0 + on_x_t * x_t
        divergence = gaussian_divergence(true_mean, posterior, mean, log_variance)
        likelihood = binned_log_likelihood(x_0, mean, log_variance / 2)
        last = broadcast_time(s, x_0) == 0
        return torch.where(last, -likelihood, divergence) / math.log(2)


def one_step_before(t: Float[Tensor, " b"], num_steps: int) -> Float[Tensor, " b"]:
    """Return the time one discrete step nearer to the data, in float64; exactly 0 at the data."""
    s = t.double() - 1 / num_steps
    return torch.where(s < 0.5 / num_steps, torch.zeros_like(s), s)


def _smallest_log_variance(
    path: VariancePreserving, s: Float[Tensor, " b"], t: Float[Tensor, " b"], like: Tensor
) -> Tensor:
    """Return the posterior's log variance.

    The step that ends at the data has no posterior variance: it takes that of the step before.
    """
    one = torch.full_like(s, 1 / path.num_steps)
    at_data = s == 0
    step = Transition.of(path, torch.where(at_data, one, s), torch.where(at_data, 2 * one, t))
    return broadcast_time(step.posterior_variance.log(), like).to(like)


def interpolated_log_variance(
    fraction: Float[Tensor, "b c f h w"],
    smallest: Float[Tensor, "..."],
    largest: Float[Tensor, "..."],
) -> Float[Tensor, "b c f h w"]:
    """Interpolate between two bounds: -1 is the lower and 1 the upper (arXiv 2102.09672, equation
    15).
    """
    fraction = (fraction + 1) / 2
    return fraction * largest + (1 - fraction) * smallest


def gaussian_divergence(
    mean: Float[Tensor, "b c f h w"],
    variance: Float[Tensor, "..."],
    other_mean: Float[Tensor, "b c f h w"],
    other_log_variance: Float[Tensor, "b c f h w"],
) -> Float[Tensor, "b c f h w"]:
    """Return the Kullback-Leibler divergence of the second Gaussian from the first, in nats.

    Where the first has no variance it is meaningless, and finite.
    """
    tiny = torch.finfo(variance.dtype).tiny
    ratio = (variance + (mean - other_mean).square()) * torch.exp(-other_log_variance)
    return 0.5 * (ratio - 1 + other_log_variance - variance.clamp(min=tiny).log())


def binned_log_likelihood(
    x: Float[Tensor, "b c f h w"],
    mean: Float[Tensor, "b c f h w"],
    log_std: Float[Tensor, "b c f h w"],
    half_bin: float = 1 / 255,
) -> Float[Tensor, "b c f h w"]:
    """Return the log of a Gaussian's mass in the bin around ``x``; the outermost bins are open
    (arXiv 2006.11239, equation 13).
    """
    scale = torch.exp(-log_std)
    upper = torch.special.ndtr((x - mean + half_bin) * scale)
    lower = torch.special.ndtr((x - mean - half_bin) * scale)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()
