"""Paths, times and predictions: published numbers, exact ends, and conversions that are inverse."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sora_lightning.diffusion import (
    CosineBetas,
    Data,
    Epsilon,
    LinearBetas,
    LogitNormal,
    LogNormalSigma,
    Preconditioned,
    Process,
    RectifiedFlow,
    ScaledLinearBetas,
    Transition,
    Uniform,
    V,
    VarianceExploding,
    VariancePreserving,
    Velocity,
    add_offset_noise,
    karras_times,
    spaced_times,
    uniform_times,
)
from sora_lightning.diffusion.paths import Betas
from sora_lightning.diffusion.predictions import Coefficients

ZERO_SNR = VariancePreserving(zero_terminal_snr=True)
PATHS = [
    RectifiedFlow(),
    VariancePreserving(),
    VariancePreserving(ScaledLinearBetas()),
    VariancePreserving(CosineBetas()),
    ZERO_SNR,
    VarianceExploding(),
]
PREDICTIONS = [Epsilon(), Data(), V(), Velocity(), Preconditioned(0.5)]


def processes():
    return [
        Process(path, prediction)
        for path, prediction in itertools.product(PATHS, PREDICTIONS)
        if not (isinstance(prediction, Epsilon) and path in (RectifiedFlow(), ZERO_SNR))
    ]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_path_starts_at_the_data_itself_and_only_loses_them(path):
    for dtype in (torch.float32, torch.float64):
        x_0, noise = torch.randn(2, 3, 4, dtype=dtype)
        assert torch.equal(path.perturb(x_0, noise, torch.zeros(3, dtype=dtype)), x_0)
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    assert (path.sigma(t).diff() >= 0).all()
    assert (path.alpha(t).diff() <= 0).all()
    assert path.alpha(t).dtype == torch.float64
    if isinstance(path, VariancePreserving):
        torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_derivatives_are_those_of_the_coefficients(path):
    # Off the points of the discrete table, where alpha has a kink.
    t = torch.tensor([0.01234, 0.2005, 0.5003, 0.9871], dtype=torch.float64, requires_grad=True)
    for coefficient, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        h = 1e-6
        numeric = (coefficient(t.detach() + h) - coefficient(t.detach() - h)) / (2 * h)
        torch.testing.assert_close(derivative(t.detach()), numeric, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("betas", "last"),
    [(LinearBetas(), 4.0358e-5), (ScaledLinearBetas(), 0.0046601)],
)
def test_the_last_alphas_are_the_published_ones(betas, last):
    one = torch.ones((), dtype=torch.float64)
    path = VariancePreserving(betas)
    assert math.isclose(path.alpha(one) ** 2, last, rel_tol=1e-5)
    # Step n of the table stands at (n + 1) / 1000, in either precision.
    expected = (1 - betas(1000)).cumprod(0)[249].sqrt()
    for dtype in (torch.float32, torch.float64):
        assert math.isclose(path.alpha(torch.tensor(0.25, dtype=dtype)), expected, rel_tol=1e-6)


def test_zero_terminal_snr_leaves_nothing_at_the_end_and_the_first_step_as_it_was():
    t = torch.tensor([0.0, 0.001, 1.0], dtype=torch.float64)
    plain = VariancePreserving()
    assert ZERO_SNR.alpha(t)[2] == 0
    assert ZERO_SNR.sigma(t)[2] == 1
    torch.testing.assert_close(ZERO_SNR.alpha(t)[:2], plain.alpha(t)[:2])
    with pytest.raises(ValueError, match="says nothing of the data at time 1"):
        Process(ZERO_SNR, Epsilon())
    with pytest.raises(ValueError, match="says nothing of the data at time 1"):
        Process(RectifiedFlow(), Epsilon())


def test_sigma_is_exact_next_to_the_data_in_single_precision():
    sigma = VariancePreserving().sigma(torch.tensor([0.001]))
    assert math.isclose(sigma.item() ** 2, 1e-4, rel_tol=1e-4)


@pytest.mark.parametrize("process", processes(), ids=str)
def test_a_perfect_prediction_gives_back_the_data_and_the_noise(process):
    x_0, noise = torch.randn(2, 4, 3, 1, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.3, 0.5, 0.71, 0.98], dtype=torch.float64)
    x_t = process.path.perturb(x_0, noise, t)
    estimate = process.to_x0_and_noise(process.target(x_0, noise, t), x_t, t)
    torch.testing.assert_close(estimate.x_0, x_0)
    torch.testing.assert_close(estimate.noise, noise)
    assert estimate.variance is None


@pytest.mark.parametrize("process", processes(), ids=str)
def test_gain_is_how_errors_of_the_data_grow_in_the_prediction(process):
    x_0, noise = torch.randn(2, 4, 1, 1, 1, 1, dtype=torch.float64)
    t = torch.tensor([0.3, 0.5, 0.71, 0.98], dtype=torch.float64)
    c = Coefficients.at(process.path, t, x_0)
    x_t = process.path.perturb(x_0, noise, t)
    wrong = x_0 + 0.1
    wrong_noise = (x_t - c.alpha * wrong) / c.sigma  # the same x_t, other data
    change = process.target(wrong, wrong_noise, t) - process.target(x_0, noise, t)
    torch.testing.assert_close(change.abs(), 0.1 * process.prediction.output_scale(c))


def test_preconditioning_with_unit_data_on_a_preserving_path_is_minus_v():
    x_0, noise = torch.randn(2, 3, 1, 1, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    path = VariancePreserving()
    edm, v = Process(path, Preconditioned(1.0)), Process(path, V())
    torch.testing.assert_close(edm.target(x_0, noise, t), -v.target(x_0, noise, t))
    torch.testing.assert_close(edm.inputs(x_0, t), x_0)


def test_preconditioning_gives_inputs_and_targets_of_unit_variance():
    torch.manual_seed(0)
    process = Process(VarianceExploding(), Preconditioned(0.5))
    x_0 = 0.5 * torch.randn(200_000, 1, 1, 1, 1)
    noise = torch.randn_like(x_0)
    for t in (0.2, 0.45, 0.9):
        times = torch.full((len(x_0),), t)
        x_t = process.path.perturb(x_0, noise, times)
        assert math.isclose(process.inputs(x_t, times).std(), 1, rel_tol=0.01)
        assert math.isclose(process.target(x_0, noise, times).std(), 1, rel_tol=0.01)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_step_and_its_reverse_are_one_joint_distribution(path):
    s, t = torch.tensor([0.2, 0.4]).double(), torch.tensor([0.3, 0.9]).double()
    step = Transition.of(path, s, t)
    # Mean and variance of x_s by way of x_t are those of x_s itself.
    mean = step.x_0_coefficient + step.x_t_coefficient * path.alpha(t)
    variance = step.posterior_variance + step.x_t_coefficient**2 * path.sigma(t) ** 2
    torch.testing.assert_close(mean, path.alpha(s))
    torch.testing.assert_close(variance, path.sigma(s) ** 2)
    exact = VariancePreserving()
    single = Transition.of(exact, t.new_tensor([0.249]), t.new_tensor([0.25]))
    torch.testing.assert_close(single.beta, LinearBetas()(1000)[249:250])


def test_training_times_follow_their_distributions():
    torch.manual_seed(0)
    normal = torch.randn(100_001)
    t = Uniform()(normal)
    assert math.isclose(t.mean(), 0.5, abs_tol=0.005)
    assert math.isclose(t.var(), 1 / 12, abs_tol=0.002)
    steps = Uniform(num_values=10)(normal)
    assert sorted(set((steps * 10).round().int().tolist())) == list(range(1, 11))
    assert steps.max() == 1
    path = VarianceExploding()
    sigma = path.sigma(LogNormalSigma(path=path)(normal))
    assert math.isclose(sigma.log().median(), -1.2, abs_tol=0.02)
    assert math.isclose(sigma.log().std(), 1.2, abs_tol=0.02)


def test_the_shift_grows_with_the_root_of_the_tokens():
    times = LogitNormal(shift=2.0, base_tokens=48)
    assert times.sampling_shift(48) == 2.0
    assert times.sampling_shift(192) == 4.0
    assert LogitNormal(shift=2.0).sampling_shift(192) == 2.0
    assert LogNormalSigma().sampling_shift(192) == 1.0
    normal = torch.randn(2)
    both = times(normal, torch.tensor([48, 192]))
    for i, shift in enumerate((2.0, 4.0)):
        torch.testing.assert_close(both[i : i + 1], LogitNormal(shift=shift)(normal[i : i + 1]))
    torch.testing.assert_close(times(normal, 192), LogitNormal(shift=4.0)(normal))
    with pytest.raises(ValueError, match="asks for the clips' num_tokens"):
        times(normal)


def test_grids_of_times_hold_the_steps_they_name():
    times = spaced_times(250)
    assert len(times) == 251
    assert times[0] == 1
    assert times[-1] == 0
    torch.testing.assert_close(times[-2], torch.tensor(0.001).double())
    # DiT's 250 of 1000 steps: a stride of 999 / 249, rounded.
    steps = ((times[:-1] * 1000).round().int() - 1).flip(0).tolist()
    assert steps[:4] == [0, 4, 8, 12]
    assert steps[-2:] == [995, 999]
    path = VarianceExploding()
    sigma = path.sigma(karras_times(5, path))
    assert sigma[-1] == 0
    assert math.isclose(sigma[0], 80)
    assert math.isclose(sigma[-2], 0.002, rel_tol=1e-9)
    for call in (lambda: spaced_times(1), lambda: spaced_times(1001)):
        with pytest.raises(ValueError, match="num_steps"):
            call()
    with pytest.raises(ValueError, match="sigma_min"):
        karras_times(5, path, sigma_min=0.0)
    assert len(uniform_times(3)) == 4


def test_offset_noise_moves_whole_frames_and_has_the_variance_it_should():
    torch.manual_seed(0)
    noise, shift = torch.randn(500, 4, 3, 4, 4), torch.randn(500, 4, 3, 1, 1)
    moved = add_offset_noise(noise, shift, 0.5)
    assert math.isclose(moved.var(), 1.25, rel_tol=0.02)
    within = (moved - noise).std(dim=(3, 4))
    assert within.max() < 1e-6


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: VariancePreserving(LinearBetas(0.0, 0.02)), "between 0 and 1"),
        (lambda: VariancePreserving(num_steps=1), "num_steps = 1"),
        (lambda: VarianceExploding(sigma_max=0.0), "sigma_max = 0"),
        (lambda: Preconditioned(0.0), "data_std = 0.0"),
        (lambda: Uniform(shift=0.0), "shift = 0.0"),
        (lambda: LogNormalSigma(std=0.0), "std = 0.0"),
        (
            lambda: Process().to_x0_and_noise(
                torch.ones(1, 3, 1, 1, 1), torch.ones(1, 2, 1, 1, 1), torch.ones(1)
            ),
            "3 channels: must be 2",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_betas_are_a_part_that_can_be_exchanged():
    class Constant(Betas):
        def __call__(self, num_steps):
            return torch.full((num_steps,), 0.5, dtype=torch.float64)

    alphas = VariancePreserving(Constant(), num_steps=4).alphas
    torch.testing.assert_close(alphas**2, 0.5 ** torch.arange(5).double())
