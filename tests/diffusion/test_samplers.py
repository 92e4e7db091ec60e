"""Samplers reach the exact flow of Gaussian data at their order; those that add noise, its
distribution.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sora_lightning.diffusion import (
    DDIM,
    DDPM,
    Epsilon,
    Preconditioned,
    Process,
    Transition,
    UniPC,
    V,
    VarianceExploding,
    VariancePreserving,
    dpm_solver,
    euler,
    heun,
    spaced_times,
    uniform_times,
)
from tests.diffusion.gaussian import Gaussian, condition

DATA, NARROW = Gaussian(), Gaussian(1.0, 0.2)
VP = VariancePreserving()
ZERO_SNR = VariancePreserving(zero_terminal_snr=True)
PROCESSES = [
    Process(),
    Process(VP, Epsilon()),
    Process(VarianceExploding(), Preconditioned(0.5)),
]
SAMPLERS = {
    "euler": (euler, 1),
    "heun": (heun, 2),
    "dpm_solver": (dpm_solver, 2),
    "unipc1": (UniPC(1), 2),  # the corrector of a predictor of order p has order p + 1
    "unipc2": (UniPC(2), 3),
    "unipc3": (UniPC(3), 4),
}
QUANTILES = torch.linspace(-2, 2, 5, dtype=torch.float64).reshape(-1, 1, 1, 1, 1)


def run(sampler, process, times, draw=None):
    start = NARROW.at(process, float(times[0]), QUANTILES)
    extra = () if draw is None else (draw,)
    best = NARROW.denoiser(process)
    return sampler(best, start, times, condition(len(QUANTILES)), process, *extra)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_samplers_converge_at_their_order(name, process):
    """Between two times inside the path, where no step is cut short."""
    sampler, order = SAMPLERS[name]
    first, last = (0.9, 0.3) if isinstance(process.path, VarianceExploding) else (0.8, 0.2)
    errors = []
    for num_steps in (24, 48):
        times = torch.linspace(first, last, num_steps + 1, dtype=torch.float64)
        x = run(sampler, process, times)
        errors.append((x - NARROW.at(process, last, QUANTILES)).abs().max().item())
    assert math.isclose(math.log2(errors[0] / errors[1]), order, abs_tol=0.5), errors


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("process", [Process(), Process(ZERO_SNR, V())], ids=str)
def test_samplers_end_at_the_data(name, process):
    sampler, _ = SAMPLERS[name]
    x = run(sampler, process, uniform_times(20).double())
    error = (x - NARROW.at(process, 0.0, QUANTILES)).abs().max().item()
    assert error < 0.15


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_euler_is_ddim_without_noise(process):
    times = uniform_times(7).double()
    torch.testing.assert_close(run(euler, process, times), run(DDIM(), process, times))


def test_heun_starts_where_only_noise_is_left():
    x = run(heun, Process(ZERO_SNR, V()), uniform_times(4).double())
    assert torch.isfinite(x).all()


def exact_moments(process, times, *, eta=None, large=False):
    """Mean and standard deviation of the samples of a sampler with noise: the best denoiser is
    affine, so both follow a recursion.
    """
    path = process.path
    mean, variance = (
        DATA.at(process, float(times[0]), torch.tensor(q).double()) for q in (0.0, 1.0)
    )
    variance = (variance - mean) ** 2
    for t, s in itertools.pairwise(times):
        alpha, sigma, alpha_s, sigma_s = (
            float(share(time)) for time in (t, s) for share in (path.alpha, path.sigma)
        )
        slope = alpha * DATA.std**2 / (alpha**2 * DATA.std**2 + sigma**2)  # of x_0 in x_t
        start = DATA.mean * (1 - slope * alpha)
        step = Transition.of(path, s, t)
        fresh = float(step.beta if large else step.posterior_variance) * (
            1 if eta is None else eta**2
        )
        fresh *= float(s > 0)
        to_data, to_noisy = float(step.x_0_coefficient), float(step.x_t_coefficient)
        if eta is not None:
            to_noisy = math.sqrt(sigma_s**2 - fresh) / sigma
            to_data = alpha_s - alpha * to_noisy
        factor = to_data * slope + to_noisy
        mean, variance = factor * mean + to_data * start, factor**2 * variance + fresh
    return float(mean), math.sqrt(variance)


@pytest.mark.parametrize(
    ("sampler", "settings"),
    [
        (DDPM(), {}),
        (DDPM(large_variance=True), {"large": True}),
        (DDIM(eta=1.0), {"eta": 1.0}),
        (DDIM(eta=0.5), {"eta": 0.5}),
    ],
)
@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_samplers_with_noise_reach_the_moments_they_must(sampler, settings, process):
    torch.manual_seed(0)
    n = 20_000
    times = uniform_times(12).double()
    times[0] = 0.98
    noise = torch.randn(n, 1, 1, 1, 1, dtype=torch.float64)
    start = DATA.at(process, float(times[0]), noise)
    x = sampler(DATA.denoiser(process), start, times, condition(n), process, torch.randn_like)
    mean, std = exact_moments(process, times, **settings)
    assert math.isclose(x.mean(), mean, abs_tol=0.02)
    assert math.isclose(x.std(), std, rel_tol=0.03)
    # More steps end nearer to the data's own.
    fine = torch.linspace(0.98, 0, 400, dtype=torch.float64)
    mean, std = exact_moments(process, fine, **settings)
    assert math.isclose(mean, DATA.mean, abs_tol=0.02)
    assert math.isclose(std, DATA.std, rel_tol=0.04)


def test_ddim_with_all_noise_is_ddpm():
    process, times = Process(VP, Epsilon()), spaced_times(20)
    fixed = torch.randn_like(QUANTILES)
    torch.testing.assert_close(
        run(DDIM(eta=1.0), process, times, lambda like: fixed),
        run(DDPM(), process, times, lambda like: fixed),
    )


def test_few_steps_with_the_learned_variance_keep_the_deviation_that_fixed_ones_lose():
    """The exact posterior of Gaussian data is a Gaussian with more variance than DDPM's: with it
    any number of steps is exact.
    """
    torch.manual_seed(0)
    n, process = 50_000, Process(VP, Epsilon())
    best = DATA.denoiser(process)
    times = spaced_times(8)
    steps = list(itertools.pairwise(times))

    def learned(x, t, c):
        now = next((t_, s) for t_, s in steps if math.isclose(t_, float(t[0]), rel_tol=1e-9))
        step = Transition.of(VP, now[1], now[0])
        variance = step.posterior_variance + step.x_0_coefficient**2 * DATA.data_variance(
            process, now[0]
        )
        share = torch.tensor(0.0)
        if now[1] > 0:
            smallest, largest = step.posterior_variance.log(), step.beta.log()
            share = 2 * (variance.log() - smallest) / (largest - smallest) - 1
        return torch.cat([best(x, t, c), share.expand_as(x)], dim=1)

    start = DATA.at(process, 1.0, torch.randn(n, 1, 1, 1, 1, dtype=torch.float64))
    exact, fixed = (
        DDPM()(denoiser, start, times, condition(n), process, torch.randn_like).std()
        for denoiser in (learned, best)
    )
    # The last step adds no noise, so what the data vary within it is missing.
    last = DATA.data_variance(process, times[-2:-1]).item()
    assert math.isclose(exact, math.sqrt(DATA.std**2 - last), rel_tol=0.01)
    assert fixed < 0.97 * exact


def test_noise_is_asked_for_by_name_where_it_is_needed():
    times = spaced_times(4)
    with pytest.raises(ValueError, match="give it noise_fn"):
        run(DDPM(), Process(VP, Epsilon()), times)
    with pytest.raises(ValueError, match=r"eta = 1\.5"):
        DDIM(eta=1.5)
    with pytest.raises(ValueError, match="order = 4"):
        UniPC(4)


def test_a_sampler_starts_anywhere_on_the_path():
    times = uniform_times(10).double()
    process, best = Process(), NARROW.denoiser(Process())
    start = NARROW.at(process, 1.0, QUANTILES)
    middle = euler(best, start, times[:6], condition(5), process)
    rest = euler(best, middle, times[5:], condition(5), process)
    torch.testing.assert_close(rest, run(euler, process, times))
