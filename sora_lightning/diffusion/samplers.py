"""From noise to data: one flat loop a sampler, one signature.

Every sampler takes latents ``x`` at the first of falling ``times`` to the last of them.
``noise_fn`` returns standard normal noise of a tensor's shape, for samplers that add some.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.checks import require_in
from sora_lightning.diffusion.objectives import interpolated_log_variance
from sora_lightning.diffusion.paths import Path, Transition
from sora_lightning.diffusion.predictions import Process
from sora_lightning.types import Condition, DenoiserFunction

NoiseFunction = Callable[[Tensor], Tensor]
Sampler = Callable[
    [
        DenoiserFunction,
        Float[Tensor, "b c f h w"],
        Float[Tensor, " s"],
        Condition,
        Process,
        NoiseFunction,
    ],
    Float[Tensor, "b c f h w"],
]
RECTIFIED_FLOW = Process()


def no_noise(like: Tensor) -> Tensor:
    """The default ``noise_fn``, for samplers that add no noise. Raises ``ValueError``."""
    raise ValueError("this sampler adds noise: give it noise_fn, a function from a tensor to noise")


def euler(
    denoiser: DenoiserFunction,
    x: Float[Tensor, "b c f h w"],
    times: Float[Tensor, " s"],
    condition: Condition,
    process: Process = RECTIFIED_FLOW,
    noise_fn: NoiseFunction = no_noise,
) -> Float[Tensor, "b c f h w"]:
    """Euler's method where the path is straight: one call a step, first order.

    On every path it equals ``DDIM``.
    """
    for t, s in itertools.pairwise(times):
        alpha, sigma = alpha_sigma(process.path, s)
        x_0, noise, _ = process.denoise(denoiser, x, t, condition)
        x = alpha * x_0 + sigma * noise
    return x


def heun(
    denoiser: DenoiserFunction,
    x: Float[Tensor, "b c f h w"],
    times: Float[Tensor, " s"],
    condition: Condition,
    process: Process = RECTIFIED_FLOW,
    noise_fn: NoiseFunction = no_noise,
) -> Float[Tensor, "b c f h w"]:
    """Heun's method where the path is straight (arXiv 2206.00364, algorithm 1): two calls a step,
    second order.

    A step that ends at data, or starts where the path's scale is 0, is Euler's.
    """
    path = process.path
    for t, s in itertools.pairwise(times):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(path, t), alpha_sigma(path, s)
        x_0, noise, _ = process.denoise(denoiser, x, t, condition)
        x_next = alpha_s * x_0 + sigma_s * noise
        scale_t, scale_s = (float(path.scale(time.double())) for time in (t, s))
        if s > 0 and scale_t > 0:
            x_0_next, noise_next, _ = process.denoise(denoiser, x_next, s, condition)
            of_data = alpha_s / scale_s - alpha_t / scale_t
            of_noise = sigma_s / scale_s - sigma_t / scale_t
            slope = of_data * (x_0 + x_0_next) / 2 + of_noise * (noise + noise_next) / 2
            x_next = scale_s * (x / scale_t + slope)
        x = x_next
    return x


@dataclass(frozen=True)
class DDIM:
    """DDIM (arXiv 2010.02502, equation 12). ``eta`` scales the ancestral noise; 0 adds none."""

    eta: float = 0.0

    def __post_init__(self) -> None:
        require_in("[0, 1]", eta=self.eta)

    def __call__(
        self,
        denoiser: DenoiserFunction,
        x: Float[Tensor, "b c f h w"],
        times: Float[Tensor, " s"],
        condition: Condition,
        process: Process = RECTIFIED_FLOW,
        noise_fn: NoiseFunction = no_noise,
    ) -> Float[Tensor, "b c f h w"]:
        for t, s in itertools.pairwise(times):
            alpha, sigma = alpha_sigma(process.path, s)
            x_0, noise, _ = process.denoise(denoiser, x, t, condition)
            fresh = 0.0
            if self.eta and s > 0:
                fresh = self.eta * math.sqrt(Transition.of(process.path, s, t).posterior_variance)
            x = alpha * x_0 + math.sqrt(sigma**2 - fresh**2) * noise
            if fresh:
                x = x + fresh * noise_fn(x)
        return x


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2) between any two times.

    The variance is the network's where it has learned one; else the posterior's, or with
    ``large_variance`` the step's ``beta``.
    """

    large_variance: bool = False

    def __call__(
        self,
        denoiser: DenoiserFunction,
        x: Float[Tensor, "b c f h w"],
        times: Float[Tensor, " s"],
        condition: Condition,
        process: Process = RECTIFIED_FLOW,
        noise_fn: NoiseFunction = no_noise,
    ) -> Float[Tensor, "b c f h w"]:
        for t, s in itertools.pairwise(times):
            step = Transition.of(process.path, s, t)
            x_0, _, fraction = process.denoise(denoiser, x, t, condition)
            mean = float(step.x_0_coefficient) * x_0 + float(step.x_t_coefficient) * x
            if s == 0:
                x = mean
                continue
            smallest, largest = step.posterior_variance.log(), step.beta.log()
            if fraction is None:
                std = ((largest if self.large_variance else smallest) / 2).exp().to(x)
            else:
                std = (interpolated_log_variance(fraction, smallest, largest) / 2).exp()
            x = mean + std * noise_fn(x)
        return x


def dpm_solver(
    denoiser: DenoiserFunction,
    x: Float[Tensor, "b c f h w"],
    times: Float[Tensor, " s"],
    condition: Condition,
    process: Process = RECTIFIED_FLOW,
    noise_fn: NoiseFunction = no_noise,
) -> Float[Tensor, "b c f h w"]:
    """DPM-Solver++ (2M) (arXiv 2211.01095, algorithm 2): one call a step, second order from the
    second step on. A step that ends at data is of first order.
    """
    half_log_snr = process.path.half_log_snr(times.double()).tolist()
    previous: list[tuple[float, Tensor]] = []
    for place, (t, s) in zip(half_log_snr[:-1], itertools.pairwise(times), strict=True):
        here = place, process.denoise(denoiser, x, t, condition).x_0
        x = _advance(process.path, x, t, s, [here, *previous] if s > 0 else [here])
        previous = [here]
    return x


@dataclass(frozen=True)
class UniPC:
    """Predictor and corrector with one call a step (arXiv 2302.04867, algorithms 1 and 2, for data
    prediction, with ``B_2``).

    Each step's result is corrected by the network's output at its end. ``order`` is that of the
    predictor; the corrector's is one more. Near the data the order falls.
    """

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"order = {self.order} must be 1, 2 or 3")

    def __call__(
        self,
        denoiser: DenoiserFunction,
        x: Float[Tensor, "b c f h w"],
        times: Float[Tensor, " s"],
        condition: Condition,
        process: Process = RECTIFIED_FLOW,
        noise_fn: NoiseFunction = no_noise,
    ) -> Float[Tensor, "b c f h w"]:
        half_log_snr = process.path.half_log_snr(times.double()).tolist()
        history: list[tuple[float, Tensor]] = []  # half log-SNR and estimate, the latest first
        last, order = x, 0
        for i, (t, s) in enumerate(itertools.pairwise(times)):
            x_0 = process.denoise(denoiser, x, t, condition).x_0
            here = half_log_snr[i], x_0
            if order and math.isfinite(history[0][0]):
                x = _advance(process.path, last, times[i - 1], t, [*history[:order], here])
            history = [here, *history[: self.order - 1]]
            left = len(times) - 1 - i if times[-1] == 0 else self.order
            usable = sum(math.isfinite(place) for place, _ in history)
            order = max(1, min(self.order, usable, left))
            last, x = x, _advance(process.path, x, t, s, history[:order])
        return x


def _advance(
    path: Path, x: Tensor, t: Tensor, s: Tensor, points: list[tuple[float, Tensor]]
) -> Tensor:
    """Take a step of UniPC, or of DPM-Solver++ with at most two points, from ``t`` to ``s``.

    ``points`` are estimates of the data, each with the half log-SNR of its time; the first is of
    time ``t``.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(path, t), alpha_sigma(path, s)
    (here, x_0), others = points[0], points[1:]
    decay = alpha_t * sigma_s / (alpha_s * sigma_t)  # exp(-h)
    h = -math.log(decay) if decay else math.inf
    ratios = [(place - here) / h for place, _ in others]
    d = x_0
    for weight, ratio, (_, other) in zip(_weights(ratios, h), ratios, others, strict=True):
        d = d + weight / ratio * (other - x_0)
    return sigma_s / sigma_t * x + alpha_s * (1 - decay) * d


def _weights(ratios: list[float], h: float) -> list[float]:
    """Return the weights of the differences to estimates made ``ratio h`` away.

    They are exact for polynomials (arXiv 2302.04867, equation 5); one alone has weight 1/2
    (section 3.4).
    """
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    phi, rows, values = math.expm1(-h) / -h - 1, [], []
    for k in range(1, len(ratios) + 1):
        rows.append([ratio ** (k - 1) for ratio in ratios])
        values.append(phi * math.factorial(k) / math.expm1(-h))
        phi = phi / -h - 1 / math.factorial(k + 1)
    matrix = torch.tensor(rows, dtype=torch.float64)
    return torch.linalg.solve(matrix, torch.tensor(values, dtype=torch.float64)).tolist()


def alpha_sigma(path: Path, t: Float[Tensor, ""]) -> tuple[float, float]:
    """Return alpha and sigma at one time, computed in float64."""
    return float(path.alpha(t.double())), float(path.sigma(t.double()))
