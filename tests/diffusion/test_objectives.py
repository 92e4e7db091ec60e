"""On Gaussian data every objective has a known minimum, and a learned variance a known value."""

from __future__ import annotations

import math

import pytest
import torch

from sora_lightning.diffusion import (
    Data,
    EDMWeighting,
    Epsilon,
    HybridObjective,
    Known,
    LinearBetas,
    MinSNR,
    Preconditioned,
    Process,
    RectifiedFlow,
    SquaredError,
    Transition,
    V,
    VarianceExploding,
    VariancePreserving,
    Velocity,
)
from sora_lightning.diffusion.objectives import binned_log_likelihood, one_step_before
from sora_lightning.diffusion.predictions import Coefficients
from sora_lightning.layers.patch import Patch
from tests.diffusion.gaussian import Gaussian, condition

DATA = Gaussian()
VP = VariancePreserving()
PROCESSES = [
    Process(),
    Process(RectifiedFlow(), V()),
    Process(VP, Epsilon()),
    Process(VP, Data()),
    Process(VP, V()),
    Process(VP, Velocity()),
    Process(VarianceExploding(), Preconditioned(0.5)),
]
TIMES = [0.35, 0.8]


def draws(n: int, t: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_0 = DATA.mean + DATA.std * torch.randn(n, 1, 1, 1, 1, dtype=torch.float64)
    return x_0, torch.randn_like(x_0), torch.full((n,), t, dtype=torch.float64)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("t", TIMES)
def test_the_best_denoiser_reaches_the_known_minimum_and_no_other_beats_it(process, t):
    n = 20_000
    x_0, noise, times = draws(n, t)
    best = DATA.denoiser(process)
    scale = process.prediction.output_scale(Coefficients.at(process.path, times[:1], x_0[:1]))
    known = (scale**2).squeeze() * DATA.data_variance(process, times[:1])
    reached = SquaredError(process)(best, x_0, noise, times, condition(n)).mean()
    assert math.isclose(reached, known, rel_tol=0.04)
    for change in (-0.1, 0.1):
        worse = SquaredError(process)(
            lambda x, t, c, s=change: s + best(x, t, c), x_0, noise, times, condition(n)
        )
        assert worse.mean() > reached


@pytest.mark.parametrize("weighting", [MinSNR(5.0), EDMWeighting(0.5)], ids=str)
@pytest.mark.parametrize("t", TIMES)
def test_a_weighting_is_the_same_whatever_the_network_predicts(weighting, t):
    """A wrong estimate of the data costs the same, expressed as noise, data, v or velocity."""
    x_0, noise, times = draws(5, t)
    for path in (VP, RectifiedFlow()):
        c = Coefficients.at(path, times, x_0)
        expected = (weighting(c) * 0.1**2).flatten()
        x_t = path.perturb(x_0, noise, times)
        for prediction in (Data(), V(), Velocity(), Preconditioned(0.5)):
            process = Process(path, prediction)
            wrong = x_0 + 0.1
            output = process.target(wrong, (x_t - c.alpha * wrong) / c.sigma, times)
            loss = SquaredError(process, weighting)(
                lambda *_, output=output: output, x_0, noise, times, condition(5)
            )
            torch.testing.assert_close(loss, expected)


def test_min_snr_is_the_published_weight_of_noise_and_of_v():
    x_0, noise, _ = draws(3, 0.0)
    times = torch.tensor([0.05, 0.3, 0.9], dtype=torch.float64)
    snr = (VP.alpha(times) / VP.sigma(times)) ** 2
    capped = snr.clamp(max=5)
    for prediction, weight in ((Epsilon(), capped / snr), (V(), capped / (snr + 1))):
        process = Process(VP, prediction)
        output = process.target(x_0, noise, times) + 1
        loss = SquaredError(process, MinSNR(5.0))(
            lambda *_, output=output: output, x_0, noise, times, condition(3)
        )
        torch.testing.assert_close(loss, weight)


def test_the_weighting_of_edm_is_none_in_its_own_prediction():
    process = Process(VarianceExploding(), Preconditioned(0.5))
    x_0, noise, times = draws(4, 0.5)
    arguments = (lambda x, *_: x, x_0, noise, times, condition(4))
    torch.testing.assert_close(
        SquaredError(process)(*arguments), SquaredError(process, EDMWeighting(0.5))(*arguments)
    )


COARSE = VariancePreserving(LinearBetas(0.02, 0.6), num_steps=20)


def exact_variance(t: torch.Tensor) -> tuple[Transition, torch.Tensor]:
    """Var(x_s | x_t) of Gaussian data: the posterior's, and what is unknown of the data."""
    step = Transition.of(COARSE, one_step_before(t, 20), t)
    return step, step.posterior_variance + step.x_0_coefficient**2 * DATA.data_variance(
        Process(COARSE), t
    )


@pytest.mark.parametrize("t", [0.15, 0.5, 0.9])
def test_the_bound_is_least_at_the_true_variance(t):
    n = 20_000
    x_0, noise, times = draws(n, t)
    process = Process(COARSE, Epsilon())
    objective = HybridObjective(process)
    best = DATA.denoiser(process)(COARSE.perturb(x_0, noise, times), times, condition(n))
    step, variance = exact_variance(times[:1])
    smallest, largest = step.posterior_variance.log(), step.beta.log()
    truth = 2 * (variance.log() - smallest) / (largest - smallest) - 1

    def bound(fraction: torch.Tensor) -> float:
        output = torch.cat([best, fraction.expand_as(best)], dim=1)
        return objective.vlb(output, x_0, noise, times).mean().item()

    # At the truth it is the divergence of two Gaussians of known variances.
    expected = 0.5 * (variance / step.posterior_variance).log().item() / math.log(2)
    assert math.isclose(bound(truth), expected, rel_tol=0.05)
    a_nat = 2 / (largest - smallest)
    for shift in (-0.3, 0.3):
        assert bound(truth + shift * a_nat) > bound(truth)


def test_the_hybrid_loss_is_the_sum_and_the_mean_learns_nothing_from_the_bound():
    process = Process(VP, Epsilon())
    x_0, noise, t = draws(6, 0.3)
    output = torch.randn(6, 2, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    arguments = (x_0, noise, t)
    plain = SquaredError(process).error(output, *arguments)
    vlb = HybridObjective(process).vlb(output, *arguments)
    hybrid = HybridObjective(process, vlb_weight=0.5).error(output, *arguments)
    torch.testing.assert_close(hybrid, plain + 0.5 * vlb)
    (from_hybrid,) = torch.autograd.grad(hybrid.sum(), output)
    (from_plain,) = torch.autograd.grad(plain.sum(), output, retain_graph=True)
    torch.testing.assert_close(from_hybrid[:, :1], from_plain[:, :1])
    assert (from_hybrid[:, 1:] != 0).all()


def test_the_last_step_is_the_likelihood_of_the_data_and_has_gradients():
    process = Process(VP, Epsilon())
    x_0, noise, _ = draws(4, 0.0)
    x_0 = x_0.clamp(-0.9, 0.9)  # the outermost bins are open
    t = torch.full((4,), 0.001, dtype=torch.float64)
    output = torch.cat([noise, torch.zeros_like(noise)], dim=1).requires_grad_()
    vlb = HybridObjective(process).vlb(output, x_0, noise, t)
    # A perfect mean, and a variance half way (in logarithms) between those of the first two steps.
    first = Transition.of(VP, t[:1] * 0, t[:1]).beta
    second = Transition.of(VP, t[:1], 2 * t[:1]).posterior_variance
    std = (first * second) ** 0.25
    mass = torch.special.erf(1 / 255 / std / math.sqrt(2))
    torch.testing.assert_close(vlb.flatten(), -mass.log().expand(4) / math.log(2))
    vlb.sum().backward()
    assert output.grad is not None
    assert torch.isfinite(output.grad).all()


def test_the_bins_of_the_likelihood_share_all_mass():
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64).reshape(256, 1, 1, 1, 1)
    mean, log_std = torch.full_like(levels, 0.2), torch.full_like(levels, math.log(0.3))
    total = binned_log_likelihood(levels, mean, log_std).exp().sum()
    assert math.isclose(total, 1, rel_tol=1e-6)


def test_what_is_known_is_seen_clean_and_not_asked_for():
    mask = torch.zeros(2, 1, 2, 2, 2, dtype=torch.bool)
    mask[0, :, 0] = True
    known = Known.of(mask, Patch())
    x_0, noise = torch.randn(2, 2, 3, 2, 2, 2)
    t = torch.tensor([0.6, 0.7])
    process = Process()
    seen: dict[str, torch.Tensor] = {}

    def denoiser(x_t, t, _):
        seen.update(x=x_t, t=t)
        answer = process.target(x_0, noise, torch.ones(2)) + 1
        answer[0, :, 0] = 100.0  # never to be looked at
        return answer

    loss = SquaredError(process)(denoiser, x_0, noise, t, condition(2), [known])
    torch.testing.assert_close(loss, torch.ones(2))
    assert torch.equal(seen["x"][0, :, 0], x_0[0, :, 0])
    torch.testing.assert_close(seen["x"][1], 0.3 * x_0[1] + 0.7 * noise[1])
    expected = torch.tensor([[0.0] * 4 + [0.6] * 4, [0.7] * 8])
    torch.testing.assert_close(seen["t"], expected)


def test_known_latents_may_carry_noise():
    mask = torch.ones(1, 1, 2, 1, 1, dtype=torch.bool)
    mask[:, :, 1] = False
    known = Known.of(mask, Patch(), torch.tensor([0.1]))
    x_0, noise = torch.randn(2, 1, 3, 2, 1, 1)
    seen: list[torch.Tensor] = []
    SquaredError()(
        lambda x, t, c: seen.extend((x, t)) or x,
        x_0,
        noise,
        torch.tensor([0.5]),
        condition(1),
        [known],
    )
    torch.testing.assert_close(seen[0][:, :, 0], (0.9 * x_0 + 0.1 * noise)[:, :, 0])
    torch.testing.assert_close(seen[1], torch.tensor([[0.1, 0.5]]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: HybridObjective(Process()), "must be a VariancePreserving"),
        (lambda: MinSNR(0.0), "gamma = 0.0"),
        (lambda: SquaredError(offset_noise=-0.1), "offset_noise = -0.1"),
        (
            lambda: HybridObjective(Process(VP, Epsilon())).error(
                *torch.ones(3, 1, 1, 1, 1, 1), torch.ones(1)
            ),
            "1 channels: a learned variance needs 2",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
