"""Gaussian data have a known velocity, so losses, samplers and guidance have exact answers."""

import itertools
import math

import pytest
import torch

from sora_lightning.diffusion import (
    ClassifierFreeGuidance,
    LogitNormal,
    Process,
    RectifiedFlow,
    SquaredError,
    euler,
    heun,
    uniform_times,
)
from sora_lightning.diffusion.paths import (
    broadcast_time,
    shift_time,
)
from sora_lightning.types import Condition

MEAN, STD = 0.4, 0.5


def condition(b, value=0.0):
    return Condition(
        torch.zeros(b, 1, 2), torch.ones(b, 1, dtype=torch.bool), torch.full((b, 2), value)
    )


def gaussian_velocity(x_t, t, _=None):
    """E[noise - x_0 | x_t] for x_0 ~ N(MEAN, STD^2)."""
    t = broadcast_time(t, x_t)
    variance = ((1 - t) * STD) ** 2 + t**2
    residual = (x_t - (1 - t) * MEAN) / variance
    return (t - (1 - t) * STD**2) * residual - MEAN


def exact_endpoint(noise):
    """The flow of Gaussians is monotone, so it maps each quantile to the same quantile."""
    return MEAN + STD * noise


def test_the_line_runs_from_data_to_noise():
    x_0, noise = torch.randn(2, 3, 4, 1, 2, 2, dtype=torch.float64)
    zeros, ones = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    path, process = RectifiedFlow(), Process()
    torch.testing.assert_close(path.perturb(x_0, noise, zeros), x_0)
    torch.testing.assert_close(path.perturb(x_0, noise, ones), noise)
    t = torch.rand(3, dtype=torch.float64)
    x_t, velocity = path.perturb(x_0, noise, t), process.target(x_0, noise, t)
    torch.testing.assert_close(velocity, noise - x_0)
    torch.testing.assert_close(process.to_x0_and_noise(velocity, x_t, t).x_0, x_0)


def test_the_optimal_denoiser_reaches_the_known_loss_and_no_other_beats_it():
    torch.manual_seed(0)
    n = 200_000
    x_0 = MEAN + STD * torch.randn(n, 1, 1, 1, 1, dtype=torch.float64)
    noise = torch.randn_like(x_0)
    t = torch.full((n,), 0.3, dtype=torch.float64)
    # Var(noise - x_0 | x_t) = STD^2 / ((1 - t)^2 STD^2 + t^2)
    known = STD**2 / ((0.7 * STD) ** 2 + 0.3**2)
    best = SquaredError()(gaussian_velocity, x_0, noise, t, condition(n)).mean()
    assert math.isclose(best, known, rel_tol=0.01)
    for change in (0.9, 1.1):
        worse = SquaredError()(
            lambda x, t, c, s=change: s * gaussian_velocity(x, t), x_0, noise, t, condition(n)
        )
        assert worse.mean() > best


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_samplers_converge_to_the_exact_flow_at_their_order(sampler, order):
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    errors = []
    for num_steps in (40, 80, 160):
        times = uniform_times(num_steps).double()
        x = sampler(gaussian_velocity, noise, times, condition(len(noise)))
        errors.append((x - exact_endpoint(noise)).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert math.isclose(math.log2(coarse / fine), order, abs_tol=0.25)
    assert errors[-1] < 0.02


def test_times_fall_from_one_to_zero():
    times = uniform_times(10, shift=3.0)
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    assert (times[1:-1] > uniform_times(10)[1:-1]).all()
    with pytest.raises(ValueError, match="num_steps = 0"):
        uniform_times(0)


def test_training_times_have_the_median_that_mean_and_shift_say():
    torch.manual_seed(0)
    t = LogitNormal(mean=0.5, std=1.2, shift=2.0)(torch.randn(100_001))
    assert ((t > 0) & (t < 1)).all()
    expected = shift_time(torch.sigmoid(torch.tensor(0.5)), 2.0)
    assert math.isclose(t.median(), expected, abs_tol=0.01)
    with pytest.raises(ValueError, match="must be positive"):
        LogitNormal(std=0.0)


def test_guidance_is_the_conditional_at_one_the_unconditional_at_zero_and_linear():
    def denoiser(x_t, t, condition):
        return x_t * t.reshape(-1, 1, 1, 1, 1) + condition.pooled[:, :1, None, None, None]

    x, t = torch.randn(3, 1, 2, 2, 2), torch.rand(3)
    given, null = condition(3, 1.0), condition(3, -1.0)
    guided = {s: ClassifierFreeGuidance(denoiser, null, s)(x, t, given) for s in (0.0, 1.0, 3.0)}
    torch.testing.assert_close(guided[1.0], denoiser(x, t, given))
    torch.testing.assert_close(guided[0.0], denoiser(x, t, null))
    torch.testing.assert_close(guided[3.0], 3 * guided[1.0] - 2 * guided[0.0])
