"""Blocks left out while sampling: exact at an interval of 1, nearer the smaller it is, and only the
middle is left out.
"""

from __future__ import annotations

import pytest
import torch

from sora_lightning.denoisers import DiT, FeatureCaching, UViT
from sora_lightning.diffusion import (
    ClassifierFreeGuidance,
    TwoConditionGuidance,
    euler,
    heun,
    uniform_times,
)
from sora_lightning.layers.transformer import TransformerSize
from tests.diffusion.gaussian import condition


@pytest.fixture(scope="module")
def network() -> DiT:
    torch.manual_seed(0)
    network = DiT(3, 2, size=TransformerSize(5, 24, 2), patch=(1, 1, 1))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


X = torch.randn(2, 3, 2, 2, 2, generator=torch.Generator().manual_seed(1))


def sampled(denoiser, sampler=euler, num_steps=12):
    return sampler(denoiser, X, uniform_times(num_steps), condition(2))


@pytest.mark.parametrize("sampler", [euler, heun], ids=["euler", "heun"])
def test_an_interval_of_one_is_exact(network, sampler):
    cached = FeatureCaching(1).around(network)
    assert torch.equal(sampled(cached, sampler), sampled(network, sampler))
    assert cached.num_reused == 0


def test_the_error_grows_with_the_interval_and_shrinks_with_the_steps(network):
    def error(interval: int, num_steps: int) -> float:
        cached = FeatureCaching(interval).around(network)
        exact = sampled(network, num_steps=num_steps)
        return float((sampled(cached, num_steps=num_steps) - exact).norm() / exact.norm())

    errors = [error(interval, 12) for interval in (2, 3, 6)]
    assert 0 < errors[0] < errors[1] < errors[2]
    assert error(2, 96) < errors[0] / 4


def test_only_the_middle_blocks_are_left_out(network):
    calls = [0] * 5
    handles = []
    for i, block in enumerate(network.blocks):

        def count(*_, i=i):
            calls[i] += 1

        handles.append(block.register_forward_hook(count))
    cached = FeatureCaching(3, first=1, last=2).around(network)
    sampled(cached)
    for handle in handles:
        handle.remove()
    assert calls == [12, 4, 4, 12, 12]
    assert (cached.num_computed, cached.num_reused) == (4, 8)


def test_each_call_of_a_step_has_a_memory_of_its_own(network):
    """Guidance by two conditions calls three times a step: as three networks with a cache each."""
    null = condition(2, 1.0)
    cached = FeatureCaching(2).around(network)
    together = sampled(TwoConditionGuidance(cached, cached, null, 1.5, 2.0))
    assert cached.num_computed == 3 * 6
    full, image, neither = (FeatureCaching(2).around(network) for _ in range(3))

    def apart(x_t, t, condition):
        c, i, u = full(x_t, t, condition), image(x_t, t, null), neither(x_t, t, null)
        return u + 1.5 * (i - u) + 2.0 * (c - i)

    torch.testing.assert_close(together, sampled(apart))
    doubled = FeatureCaching(2).around(network)
    sampled(ClassifierFreeGuidance(doubled, null, 2.0))
    assert doubled.num_computed == 6


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda n: FeatureCaching(0), "interval = 0"),
        (lambda n: FeatureCaching(2, first=-1), "first = -1"),
        (lambda n: FeatureCaching(2, 3, 2).around(n), "leave none of the 5 blocks"),
        (lambda n: FeatureCaching(2).around(UViT), "is for a DiT"),
    ],
)
def test_what_cannot_be_cached_is_refused(network, call, said):
    with pytest.raises(ValueError, match=said):
        call(network)
