"""Every option of the configuration reaches the sampler, and what makes no sense is refused."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from sora_lightning.conditioning import Unconditional
from sora_lightning.diffusion import (
    DDIM,
    DDPM,
    GuidanceInterval,
    Preconditioned,
    Process,
    RectifiedFlow,
    UniPC,
    VarianceExploding,
    euler,
    karras_times,
    spaced_times,
    uniform_times,
)
from sora_lightning.generation import (
    SAMPLERS,
    GuidanceConfig,
    SamplingConfig,
    TimeGrid,
    VideoGenerator,
    seeded_noise,
)
from sora_lightning.tokenizers import ConvTokenizer
from sora_lightning.types import TokenGrid
from tests.generation.test_guided_runs import network

GRID = TokenGrid(2, 2, 2)
EXPLODING = VarianceExploding()


def test_a_time_grid_gives_the_times_of_its_kind() -> None:
    flow = RectifiedFlow()
    cases = [
        (TimeGrid(), flow, uniform_times(8, 3.0)),
        (TimeGrid(shift=1.0), flow, uniform_times(8)),
        (TimeGrid("spaced", num_values=100), flow, spaced_times(8, 100)),
        (TimeGrid("karras", sigma_min=0.01), EXPLODING, karras_times(8, EXPLODING, 0.01)),
    ]
    for grid, path, expected in cases:
        assert torch.equal(grid.times(8, path, lambda: 3.0), expected)


@torch.no_grad()
def test_the_sampler_visits_the_times_of_the_grid() -> None:
    tokenizer = ConvTokenizer(4, [8, 16], down_time=[True], down_space=[True], patch=4).eval()
    process = Process(EXPLODING, Preconditioned())
    sampling = SamplingConfig(
        num_steps=5, time_grid=TimeGrid("karras"), guidance=GuidanceConfig(scale=1.0)
    )
    conditioner, denoiser = network(0)
    video_generator = VideoGenerator(
        tokenizer, conditioner, denoiser, process=process, sampling=sampling
    )
    made = video_generator.latents(["a red circle"], GRID, [3])
    times = karras_times(5, EXPLODING)
    x = EXPLODING.perturb(torch.zeros(1, 4, 2, 2, 2), seeded_noise([3], 4, GRID), times[:1].float())
    expected = euler(denoiser, x, times, conditioner(["a red circle"]), process)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"time_grid\.kind = karras: is for a VarianceExploding"):
        replace(video_generator, process=Process())
    uniform = replace(video_generator, sampling=replace(sampling, time_grid=TimeGrid()))
    assert not torch.allclose(uniform.latents(["a red circle"], GRID, [3]), made, atol=1e-3)


@torch.no_grad()
def test_the_generator_calls_the_sampler_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """One hop from ``VideoGenerator.latents`` to the sampler's equation, guided or not."""
    callers: list[str] = []

    def spy(denoiser, x, *_):
        callers.append(sys._getframe(1).f_code.co_name)
        return x

    monkeypatch.setitem(SAMPLERS, "euler", spy)
    tokenizer = ConvTokenizer(4, [8, 16], down_time=[True], down_space=[True], patch=4).eval()
    VideoGenerator(tokenizer, *network(0)).latents(["a red circle"], GRID, [3])
    assert callers == ["latents"]


def test_samplers_differ_by_their_names() -> None:
    assert SAMPLERS["ddim"] == DDIM(eta=0.0)
    assert SAMPLERS["ddim-ancestral"] == DDIM(eta=1.0)
    assert SAMPLERS["ddpm-large"] == DDPM(large_variance=True)
    assert SAMPLERS["unipc-3"] == UniPC(order=3)
    assert len({str(sampler) for sampler in SAMPLERS.values()}) == len(SAMPLERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guidance_acts_at_both_ends_of_its_interval(dtype: torch.dtype) -> None:
    """Also where a time's rounding lies outside of the interval."""
    limited = GuidanceInterval(lambda x, t, c: x + 1, lambda x, t, c: x, 0.1, 0.8)
    x, condition = torch.zeros(1, 1, 1, 1, 1), Unconditional(2)([""])
    for time, active in ((0.1, True), (0.8, True), (0.0999, False), (0.8001, False)):
        t = torch.tensor([time], dtype=dtype)
        assert bool(limited(x, t, condition)) == active


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: SamplingConfig(num_steps=0), "num_steps = 0: must be at least 1"),
        (lambda: SamplingConfig(sampler="none"), "sampler = 'none': must be one of euler, heun"),
        (lambda: SamplingConfig(resample_strength=1.5), "resample_strength = 1.5: must lie in"),
        (lambda: TimeGrid("cosine"), "time_grid.kind = cosine: must be uniform, karras or spaced"),
        (lambda: TimeGrid("karras", shift=2.0), "time_grid.shift = 2.0: is for uniform times"),
        (lambda: TimeGrid(shift=0.0), "time_grid.shift = 0.0: must be positive"),
        (
            lambda: TimeGrid("karras").times(8, RectifiedFlow(), lambda: 1.0),
            "time_grid.kind = karras: is for a VarianceExploding path, and .* a RectifiedFlow",
        ),
        (lambda: GuidanceConfig(interval=(0.5,)), "guidance.interval = 0.5: must be two times"),
        (lambda: GuidanceConfig(rescale=-0.5), "guidance.rescale = -0.5: must lie in"),
    ],
)
def test_what_makes_no_sense_is_refused(build, said) -> None:
    with pytest.raises(ValueError, match=said):
        build()
