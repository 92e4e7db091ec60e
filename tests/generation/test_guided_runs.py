"""How a whole sampling run is guided: settings that change nothing give what plain guidance gives,
the others what their formulas say.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sora_lightning.conditioning import TextConditioner
from sora_lightning.denoisers import DiT, FeatureCaching
from sora_lightning.generation import (
    GuidanceConfig,
    KnownFrames,
    SamplingConfig,
    VideoGenerator,
    WeakModel,
)
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems import DiffusionSystem
from sora_lightning.systems.weak_model import load_weak_model
from sora_lightning.tokenizers import ConvTokenizer
from sora_lightning.types import TokenGrid

PLAIN = SamplingConfig(num_steps=6, guidance=GuidanceConfig(3.0))
PROMPTS, SEEDS, GRID = ["a red circle", "a blue square"], [3, 4], TokenGrid(2, 2, 2)


def network(seed: int, width: int = 24) -> tuple[TextConditioner, DiT]:
    """A model that has not been trained, made to say something all the same."""
    torch.manual_seed(seed)
    conditioner = TextConditioner(width=16, depth=1, num_heads=2)
    denoiser = DiT(4, 16, size=TransformerSize(3, width, 2), patch=(1, 1, 1))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return conditioner.eval().requires_grad_(False), denoiser.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def video_generator() -> VideoGenerator:
    tokenizer = ConvTokenizer(
        4, [8, 16], down_time=[True], down_space=[True], patch=4, blocks_per_level=1
    )
    return VideoGenerator(tokenizer.eval(), *network(0), sampling=PLAIN)


def guided(**changes: object) -> SamplingConfig:
    return replace(PLAIN, guidance=replace(PLAIN.guidance, **changes))  # type: ignore[arg-type]


@torch.no_grad()
def made(video_generator: VideoGenerator, **changes: object) -> Tensor:
    return replace(video_generator, **changes).latents(PROMPTS, GRID, SEEDS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"interval": (0.0, 1.0)},
        {"rescale": 0.0},
        {"channels": 4},
        {"interval": (0.0, 1.0), "rescale": 0.0, "channels": 4},
    ],
)
def test_what_limits_nothing_is_plain_guidance(video_generator, changes):
    assert torch.equal(made(video_generator, sampling=guided(**changes)), made(video_generator))


@pytest.mark.parametrize(
    "changes",
    [{"interval": (0.0, 0.5)}, {"interval": (0.5, 1.0)}, {"rescale": 0.7}, {"channels": 3}],
)
def test_what_limits_changes_the_videos(video_generator, changes):
    changed = made(video_generator, sampling=guided(**changes))
    assert not torch.allclose(changed, made(video_generator), atol=1e-3)
    assert not torch.allclose(changed, made(video_generator, sampling=guided(scale=1.0)), atol=1e-3)


def test_more_channels_than_the_latents_have_are_refused(video_generator):
    with pytest.raises(ValueError, match=r"guidance\.channels = 5: the latents have 4"):
        made(video_generator, sampling=guided(channels=5))


def test_an_interval_without_a_step_is_no_guidance(video_generator):
    """Times of six steps are sixths, and none is asked at 0."""
    unguided = made(video_generator, sampling=guided(scale=1.0))
    for interval in ((0.0, 0.0), (0.4, 0.45)):
        assert torch.equal(made(video_generator, sampling=guided(interval=interval)), unguided)


def test_a_weak_model_that_is_the_model_itself_is_no_guidance(video_generator):
    same = WeakModel(video_generator.conditioner, video_generator.denoiser)
    torch.testing.assert_close(
        made(video_generator, weak_model=same),
        made(video_generator, sampling=guided(scale=1.0)),
        rtol=0,
        atol=1e-5,
    )


def test_a_weak_model_reads_the_prompts_by_its_own_conditioner(video_generator):
    weaker = WeakModel(*network(1, width=16))
    away = made(video_generator, weak_model=weaker)
    assert not torch.allclose(away, made(video_generator), atol=1e-3)
    assert torch.equal(
        made(video_generator, weak_model=weaker, sampling=guided(scale=1.0)),
        made(video_generator, sampling=guided(scale=1.0)),
    )
    swapped = WeakModel(video_generator.conditioner, weaker.denoiser)
    assert not torch.allclose(made(video_generator, weak_model=swapped), away, atol=1e-3)
    # A scale of 0 leaves the weak model alone.
    alone = made(
        replace(video_generator, conditioner=weaker.conditioner, denoiser=weaker.denoiser),
        sampling=guided(scale=1.0),
    )
    torch.testing.assert_close(
        made(video_generator, weak_model=weaker, sampling=guided(scale=0.0)),
        alone,
        rtol=0,
        atol=1e-5,
    )


def test_known_frames_are_kept_under_every_guidance(video_generator):
    latents = torch.randn(2, 4, 2, 2, 2, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(2, 1, 2, 2, 2, dtype=torch.bool)
    mask[:, :, 0] = True
    known = KnownFrames(latents, mask)
    plain = video_generator.latents(PROMPTS, GRID, SEEDS, known)
    for changes in (
        {"sampling": guided(interval=(0.2, 0.6), rescale=0.5)},
        {"weak_model": WeakModel(*network(1, width=16))},
    ):
        sampled = replace(video_generator, **changes).latents(PROMPTS, GRID, SEEDS, known)
        assert torch.equal(sampled[:, :, 0], latents[:, :, 0])
        assert not torch.allclose(sampled, plain, atol=1e-3)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("sampler", ["heun", "unipc"])
def test_caching_makes_a_clip_the_same_in_any_batch_within_any_interval(
    video_generator, interval, sampler
):
    """Where guidance begins or ends, a call has other clips than the one before."""
    config = replace(guided(interval=interval), sampler=sampler, num_steps=9)
    exact = made(video_generator, sampling=config)
    cached = replace(video_generator, sampling=replace(config, cache=FeatureCaching(3)))
    together = made(cached)
    for i in range(2):
        alone = cached.latents(PROMPTS[i : i + 1], GRID, SEEDS[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-4)
    assert not torch.allclose(together, exact, atol=1e-4)
    once = made(video_generator, sampling=replace(config, cache=FeatureCaching(1)))
    torch.testing.assert_close(once, exact, rtol=0, atol=1e-6)


def test_a_weak_model_must_speak_of_the_same_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def system(seed: int) -> DiffusionSystem:
        torch.manual_seed(seed)
        tokenizer = ConvTokenizer(4, [8, 16], down_time=[True], down_space=[True], patch=4)

        def denoiser(channels: int, width: int) -> DiT:
            return DiT(channels, width, size=TransformerSize(1, 16, 2), patch=(1, 1, 1))

        return DiffusionSystem(tokenizer, TextConditioner(16, 1, 2), denoiser)

    path = tmp_path / "weak.ckpt"
    path.touch()
    ours, weak = system(0), system(0)
    monkeypatch.setattr(DiffusionSystem, "from_checkpoint", lambda _: weak)
    video_generator = ours.video_generator(guided(weak_model=path))
    assert video_generator.weak_model is not None
    assert video_generator.weak_model.denoiser is weak.denoiser
    weak = system(1)
    with pytest.raises(ValueError, match="its tokenizer is another"):
        load_weak_model(ours, path)
