"""How a whole sampling run is guided: settings that change nothing give what plain guidance gives,
the others what their formulas say.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sora_lightning.cli.guidance import GuidanceArguments
from sora_lightning.conditioning import TextConditioner
from sora_lightning.denoisers import DiT, FeatureCaching
from sora_lightning.diffusion import GuidanceRecipe, UniPC, heun
from sora_lightning.generation import Guide, KnownFrames, VideoGenerator
from sora_lightning.systems import DiffusionSystem
from sora_lightning.tokenizers import ConvTokenizer
from sora_lightning.types import TokenGrid

PROMPTS, SEEDS, GRID = ["a red circle", "a blue square"], [3, 4], TokenGrid(2, 2, 2)


def network(seed: int, width: int = 24) -> tuple[TextConditioner, DiT]:
    """A model that has not been trained, made to say something all the same."""
    torch.manual_seed(seed)
    conditioner = TextConditioner(width=16, depth=1, num_heads=2)
    denoiser = DiT(4, 16, width=width, depth=3, num_heads=2, patch=(1, 1, 1))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return conditioner.eval().requires_grad_(False), denoiser.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def generator() -> VideoGenerator:
    tokenizer = ConvTokenizer(
        4, [8, 16], down_time=[True], down_space=[True], patch=4, blocks_per_level=1
    )
    return VideoGenerator(tokenizer.eval(), *network(0), num_steps=6, guidance_scale=3.0)


@torch.no_grad()
def made(generator: VideoGenerator, **changes: object) -> Tensor:
    return replace(generator, **changes).latents(PROMPTS, GRID, SEEDS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "recipe",
    [
        GuidanceRecipe((0.0, 1.0)),
        GuidanceRecipe(rescale=0.0),
        GuidanceRecipe(guided_channels=4),
        GuidanceRecipe((0.0, 1.0), 0.0, 4),
    ],
)
def test_what_limits_nothing_is_plain_guidance(generator, recipe):
    assert torch.equal(made(generator, guidance=recipe), made(generator))


@pytest.mark.parametrize(
    "recipe",
    [
        GuidanceRecipe((0.0, 0.5)),
        GuidanceRecipe((0.5, 1.0)),
        GuidanceRecipe(rescale=0.7),
        GuidanceRecipe(guided_channels=3),
    ],
)
def test_what_limits_changes_the_videos(generator, recipe):
    changed = made(generator, guidance=recipe)
    assert not torch.allclose(changed, made(generator), atol=1e-3)
    assert not torch.allclose(changed, made(generator, guidance_scale=1.0), atol=1e-3)


def test_an_interval_without_a_step_is_no_guidance(generator):
    """Times of six steps are sixths, and none is asked at 0."""
    unguided = made(generator, guidance_scale=1.0)
    for interval in ((0.0, 0.0), (0.4, 0.45)):
        assert torch.equal(made(generator, guidance=GuidanceRecipe(interval)), unguided)


def test_a_guide_that_is_the_model_itself_is_no_guidance(generator):
    same = Guide(generator.conditioner, generator.denoiser)
    torch.testing.assert_close(
        made(generator, guide=same), made(generator, guidance_scale=1.0), rtol=0, atol=1e-5
    )


def test_a_guide_reads_the_prompts_by_its_own_conditioner(generator):
    weaker = Guide(*network(1, width=16))
    away = made(generator, guide=weaker)
    assert not torch.allclose(away, made(generator), atol=1e-3)
    assert torch.equal(
        made(generator, guide=weaker, guidance_scale=1.0), made(generator, guidance_scale=1.0)
    )
    swapped = Guide(generator.conditioner, weaker.denoiser)
    assert not torch.allclose(made(generator, guide=swapped), away, atol=1e-3)
    # A scale of 0 leaves the guide alone to speak.
    alone = made(
        replace(generator, conditioner=weaker.conditioner, denoiser=weaker.denoiser),
        guidance_scale=1.0,
    )
    torch.testing.assert_close(
        made(generator, guide=weaker, guidance_scale=0.0), alone, rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match="are not for a weaker network"):
        made(generator, guide=weaker, guidance=GuidanceRecipe(rescale=0.5))


def test_known_frames_are_kept_under_every_guidance(generator):
    latents = torch.randn(2, 4, 2, 2, 2, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(2, 1, 2, 2, 2, dtype=torch.bool)
    mask[:, :, 0] = True
    known = KnownFrames(latents, mask)
    plain = generator.latents(PROMPTS, GRID, SEEDS, known)
    for changes in (
        {"guidance": GuidanceRecipe((0.2, 0.6), 0.5)},
        {"guide": Guide(*network(1, width=16))},
    ):
        guided = replace(generator, **changes).latents(PROMPTS, GRID, SEEDS, known)
        assert torch.equal(guided[:, :, 0], latents[:, :, 0])
        assert not torch.allclose(guided, plain, atol=1e-3)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("sampler", [heun, UniPC()], ids=["heun", "unipc"])
def test_caching_makes_a_clip_the_same_in_any_batch_within_any_interval(
    generator, interval, sampler
):
    """Where guidance begins or ends, a call has other clips than the one before."""
    cached = replace(
        generator,
        guidance=GuidanceRecipe(interval),
        caching=FeatureCaching(3),
        sampler=sampler,
        num_steps=9,
    )
    together = made(cached)
    for i in range(2):
        alone = cached.latents(PROMPTS[i : i + 1], GRID, SEEDS[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-4)
    assert not torch.allclose(together, made(cached, caching=None), atol=1e-4)
    once = made(cached, caching=FeatureCaching(1))
    torch.testing.assert_close(once, made(cached, caching=None), rtol=0, atol=1e-6)


def test_a_guide_must_speak_of_the_same_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def system(seed: int) -> DiffusionSystem:
        torch.manual_seed(seed)
        tokenizer = ConvTokenizer(4, [8, 16], down_time=[True], down_space=[True], patch=4)

        def denoiser(channels: int, width: int) -> DiT:
            return DiT(channels, width, width=16, depth=1, num_heads=2, patch=(1, 1, 1))

        return DiffusionSystem(tokenizer, TextConditioner(16, 1, 2), denoiser)

    path = tmp_path / "guide.ckpt"
    path.touch()
    ours, guide = system(0), system(0)
    monkeypatch.setattr(DiffusionSystem, "from_checkpoint", lambda _: guide)
    arguments = GuidanceArguments(2.0, guide=path)
    loaded = arguments.loaded_guide(ours, "cpu")
    assert loaded is not None
    assert loaded.denoiser is guide.denoiser
    guide = system(1)
    with pytest.raises(ValueError, match="its tokenizer is another"):
        arguments.loaded_guide(ours, "cpu")
