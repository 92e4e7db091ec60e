"""Each guidance is its formula, leaves what it should alone, and means the same in every
prediction.
"""

from __future__ import annotations

import pytest
import torch

from sora_lightning.diffusion import (
    Autoguidance,
    ClassifierFreeGuidance,
    Data,
    Epsilon,
    GuidanceInterval,
    Process,
    TwoConditionGuidance,
    V,
    VariancePreserving,
    rescaled,
)
from tests.diffusion.gaussian import condition

X, T = torch.randn(3, 4, 2, 2, 2), torch.full((3,), 0.5)
GIVEN, NULL = condition(3, 1.0), condition(3, -1.0)


def shifted_by_condition(x_t, t, condition):
    """Eight channels: a prediction of four that hears the condition, and a variance that does."""
    heard = x_t + condition.pooled[:, :1, None, None, None]
    return torch.cat([heard, 10 * heard], dim=1)


def test_only_the_prediction_is_guided_and_the_variance_is_the_conditionals():
    full = shifted_by_condition(X, T, GIVEN)
    guided = ClassifierFreeGuidance(shifted_by_condition, NULL, 3.0)(X, T, GIVEN)
    torch.testing.assert_close(guided[:, :4], X + 5)
    assert torch.equal(guided[:, 4:], full[:, 4:])


def test_guidance_of_three_channels_leaves_the_fourth_alone():
    guided = ClassifierFreeGuidance(shifted_by_condition, NULL, 3.0, guided_channels=3)(X, T, GIVEN)
    torch.testing.assert_close(guided[:, :3], X[:, :3] + 5)
    torch.testing.assert_close(guided[:, 3], X[:, 3] + 1)


def test_guidance_means_the_same_in_every_prediction():
    path, t = VariancePreserving(), T.double()
    x_t = X.double()
    data = {1.0: torch.randn(X.shape).double(), -1.0: torch.randn(X.shape).double()}
    estimates = []
    for prediction in (Epsilon(), Data(), V()):
        process = Process(path, prediction)

        def network(x, time, condition, process=process):
            halves = []
            for one, label, when in zip(x, condition.pooled[:, 0].tolist(), time, strict=True):
                x_0 = data[label][len(halves) % 3]
                alpha, sigma = path.alpha(when), path.sigma(when)
                noise = (one - alpha * x_0) / sigma
                halves.append(process.target(x_0[None], noise[None], when[None])[0])
            return torch.stack(halves)

        guided = ClassifierFreeGuidance(network, NULL, 2.5)(x_t, t, GIVEN)
        estimates.append(process.to_x0_and_noise(guided, x_t, t).x_0)
    expected = data[-1.0] + 2.5 * (data[1.0] - data[-1.0])
    for estimate in estimates:
        torch.testing.assert_close(estimate, expected)


def test_rescaled_guidance_has_the_conditionals_std():
    guided, conditional = 7 * torch.randn(3, 4, 2, 4, 4) + 1, torch.randn(3, 4, 2, 4, 4)

    def std(x):
        return x.flatten(1).std(1)

    torch.testing.assert_close(std(rescaled(guided, conditional, 1.0)), std(conditional))
    half = std(rescaled(guided, conditional, 0.5))
    torch.testing.assert_close(half, (std(guided) + std(conditional)) / 2)
    whole = ClassifierFreeGuidance(shifted_by_condition, NULL, 3.0, rescale=1.0)(X, T, GIVEN)
    torch.testing.assert_close(std(whole[:, :4]), std(X))


def test_guidance_holds_within_its_interval_also_where_tokens_are_known():
    guided = ClassifierFreeGuidance(shifted_by_condition, NULL, 3.0)
    limited = GuidanceInterval(guided, shifted_by_condition, 0.3, 0.6)
    for t, active in ((0.2, False), (0.3, True), (0.6, True), (0.7, False)):
        expected = (guided if active else shifted_by_condition)(X, T, GIVEN)
        tokens = torch.tensor([[0.0, t]] * 3, dtype=torch.float64)
        for times in (torch.full((3,), t, dtype=torch.float64), tokens):
            torch.testing.assert_close(limited(X, times, GIVEN), expected)
    with pytest.raises(ValueError, match=r"interval = 0\.6,0\.3: must be two times"):
        GuidanceInterval(guided, guided, 0.6, 0.3)


def test_autoguidance_goes_away_from_the_weaker():
    def weaker(x_t, t, condition):
        return shifted_by_condition(x_t, t, condition) - 1

    strong = shifted_by_condition(X, T, GIVEN)
    guided = Autoguidance(shifted_by_condition, weaker, 2.0)(X, T, GIVEN)
    torch.testing.assert_close(guided[:, :4], strong[:, :4] + 1)
    assert torch.equal(guided[:, 4:], strong[:, 4:])
    assert torch.equal(Autoguidance(shifted_by_condition, weaker, 1.0)(X, T, GIVEN), strong)


def test_two_conditions_weigh_apart():
    def with_image(x_t, t, condition):
        return shifted_by_condition(x_t, t, condition) + 100

    def guided(image_scale, text_scale):
        guidance = TwoConditionGuidance(
            with_image, shifted_by_condition, NULL, image_scale, text_scale
        )
        return guidance(X, T, GIVEN)[:, :4]

    torch.testing.assert_close(guided(1.0, 1.0), X + 1 + 100)
    torch.testing.assert_close(guided(0.0, 0.0), X - 1)
    torch.testing.assert_close(guided(1.5, 7.5), X - 1 + 1.5 * 100 + 7.5 * 2)
