"""HunyuanVideo, Latte and the U-Nets of diffusers give through our interface what they give by
themselves, and what their pipelines sample.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sora_lightning.conditioning import ClipEmbedding, HunyuanVideoText, PretrainedText
from sora_lightning.conditioning.known_frames import (
    FirstFrameAndPosition,
    KnownFrames,
    LatentSpace,
    TimeZeroConditioning,
)
from sora_lightning.denoisers import Denoiser, pretrained_denoiser
from sora_lightning.diffusion import (
    ClassifierFreeGuidance,
    euler,
    pretrained_objective,
    pretrained_times,
)
from sora_lightning.generation import SamplingConfig, VideoGenerator
from sora_lightning.generation.generator import seeded_noise
from sora_lightning.generation.sampling_config import GuidanceConfig
from sora_lightning.systems import Pipeline
from sora_lightning.tokenizers import pretrained_tokenizer
from sora_lightning.types import Condition, ImageTokens, TokenGrid

diffusers = pytest.importorskip("diffusers")
from tests.denoisers.pipelines import network, pipeline_folder  # noqa: E402

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PROMPTS = ["a red circle moves left", "a blue square"]
GRID = TokenGrid(3, 8, 8)
T = torch.tensor([0.25, 0.75])
STEPS = torch.tensor([249, 749])


def _saved(name: str, folder: Path, **changes: Any) -> tuple[Any, Denoiser]:
    theirs = network(name, **changes)
    theirs.save_pretrained(folder)
    return theirs, pretrained_denoiser(folder, fps=7.0).eval()


def _inputs(num_tokens: int) -> tuple[Tensor, Condition]:
    torch.manual_seed(1)
    mask = torch.arange(num_tokens) < torch.tensor([[num_tokens], [2]])
    tokens = torch.randn(2, num_tokens, 16)
    return torch.randn(2, 4, 3, 4, 6), Condition(tokens, mask, torch.randn(2, 16))


@torch.no_grad()
def test_hunyuanvideo_takes_the_scale_of_guidance_and_clips_vector(tmp_path: Path) -> None:
    theirs, ours = _saved("HunyuanVideo", tmp_path)
    x, condition = _inputs(5)
    inputs = condition.tokens, condition.mask.float(), condition.pooled
    expected = theirs(x, 1000 * T, *inputs, guidance=torch.tensor([6000.0, 6000.0])).sample
    assert expected.std() > 1e-2
    torch.testing.assert_close(ours(x, T, condition), expected, **CLOSE)
    other = replace(condition, pooled=condition.pooled + 1)
    assert (ours(x, T, other) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_latte_attends_to_the_captions_tokens_and_drops_variances(tmp_path: Path) -> None:
    theirs, ours = _saved("Latte", tmp_path)
    x, condition = _inputs(5)
    for clip, length in enumerate((5, 2)):
        alone = condition.tokens[clip : clip + 1, :length]
        expected = theirs(x[clip : clip + 1], STEPS[clip : clip + 1], alone).sample[:, :4]
        assert expected.std() > 1e-2
        torch.testing.assert_close(ours(x, T, condition)[clip : clip + 1], expected, **CLOSE)
    assert ours(x[:, :, :1], T, condition).shape == (2, 4, 1, 4, 6)
    with pytest.raises(ValueError, match="2 latent frames: this Latte takes 3, or 1 for an image"):
        ours(x[:, :, :2], T, condition)


@torch.no_grad()
def test_the_u_net_counts_steps_from_zero_and_takes_77_tokens(tmp_path: Path) -> None:
    theirs, ours = _saved("TextToVideoSD", tmp_path)
    x, condition = _inputs(77)
    expected = theirs(x, STEPS, condition.tokens).sample
    assert expected.std() > 1e-2
    torch.testing.assert_close(ours(x, T, condition), expected, **CLOSE)
    short = Condition(condition.tokens[:, :5], condition.mask[:, :5], condition.pooled)
    filled = torch.cat([short.tokens, torch.zeros(2, 72, 16)], dim=1)
    torch.testing.assert_close(ours(x, T, short), theirs(x, STEPS, filled).sample, **CLOSE)
    assert ours.num_tokens(x) == [3 * 4 * 6] * 2


@torch.no_grad()
def test_i2vgen_xl_takes_image_position_and_frame_rate(tmp_path: Path) -> None:
    theirs, ours = _saved("I2VGenXL", tmp_path)
    x, condition = _inputs(78)  # the last token is the image's embedding
    first = torch.zeros(2, 1, 3, 4, 6, dtype=torch.bool)
    first[:, :, 0] = True
    frames = FirstFrameAndPosition()(torch.randn_like(x), first)
    image, text = condition.tokens[:, 77:], condition.tokens[:, :77]
    fps = torch.tensor([7.0, 7.0])
    expected = theirs(x, STEPS, fps, frames[:, :4], image, text).sample
    shown = replace(condition, concat_latents=frames)
    assert expected.std() > 1e-2
    torch.testing.assert_close(ours(x, T, shown), expected, **CLOSE)
    none = Condition(text, condition.mask[:, :77], condition.pooled)
    zeros = torch.zeros_like
    expected = theirs(x, STEPS, fps, zeros(x), zeros(image), text).sample
    torch.testing.assert_close(ours(x, T, none), expected, **CLOSE)
    with pytest.raises(ValueError, match="77 tokens of text and one of the image: image_encoder"):
        ours(x, T, _inputs(79)[1])


@torch.no_grad()
def test_hunyuanvideos_trajectory_is_the_pipelines(tmp_path: Path) -> None:
    """Llama and CLIP, guidance, scheduler and network together."""
    pipeline = pipeline_folder("HunyuanVideo", tmp_path)
    generator = VideoGenerator(
        pretrained_tokenizer(tmp_path),
        HunyuanVideoText(tmp_path, dtype="float32"),
        pretrained_denoiser(tmp_path).eval(),
        process=pretrained_objective(tmp_path).process,
        training_shift=pretrained_times(tmp_path).sampling_shift,
        sampling=SamplingConfig(num_steps=4, guidance=GuidanceConfig(scale=3.0)),
    )
    noise = seeded_noise([1, 2], 4, GRID)
    theirs = pipeline(
        PROMPTS,
        negative_prompt=["", ""],
        true_cfg_scale=3.0,
        num_frames=9,
        height=64,
        width=64,
        num_inference_steps=4,
        latents=noise,
        output_type="latent",
    ).frames
    ours = generator.latents(PROMPTS, GRID, [1, 2])
    assert (ours - noise).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def _ddim(pipeline: Any, folder: Path, guided: Any, noise: Tensor, condition: Condition) -> Tensor:
    """Sample by our DDIM at the steps that the pipeline's scheduler took."""
    times = (pipeline.scheduler.timesteps + 1) / 1000
    return euler(
        guided, noise, torch.cat([times, times.new_zeros(1)]), condition,
        pretrained_objective(folder).process,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_lattes_trajectory_is_the_pipelines(scale: float, tmp_path: Path) -> None:
    """With guidance the pipeline attends to what T5 gives for the padding of an empty prompt, so
    that it gets the embedding of the empty prompt alone, repeated, which changes no attention.
    """
    pipeline = pipeline_folder("Latte", tmp_path)
    text = PretrainedText(tmp_path, max_tokens=120, dtype="float32")
    condition, null = text(PROMPTS[:1]), text.null(1)
    noise = seeded_noise([1], 4, GRID)
    prompt: dict[str, Any] = {"prompt": PROMPTS[:1]}
    if scale > 1:
        negative = null.tokens.expand(-1, condition.tokens.shape[1], -1)
        prompt = {"prompt_embeds": condition.tokens, "negative_prompt_embeds": negative}
        prompt |= {"prompt": None, "negative_prompt": None}
    theirs = pipeline(
        **prompt,
        video_length=3,
        height=16,
        width=16,
        num_inference_steps=4,
        guidance_scale=scale,
        latents=noise,
        output_type="latent",
    ).frames
    guided = ClassifierFreeGuidance(pretrained_denoiser(tmp_path).eval(), null, scale)
    ours = _ddim(pipeline, tmp_path, guided, noise, condition)
    assert (ours - noise).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_u_nets_trajectory_is_the_pipelines(tmp_path: Path) -> None:
    pipeline = pipeline_folder("TextToVideoSD", tmp_path)
    text = PretrainedText(tmp_path, dtype="float32", padded=True)
    noise = seeded_noise([1, 2], 4, GRID)
    size = {"num_frames": 3, "height": 16, "width": 16}
    steps = {"num_inference_steps": 4, "guidance_scale": 3.0}
    theirs = pipeline(PROMPTS, **size, **steps, latents=noise, output_type="latent").frames
    guided = ClassifierFreeGuidance(pretrained_denoiser(tmp_path).eval(), text.null(2), 3.0)
    ours = _ddim(pipeline, tmp_path, guided, noise, text(PROMPTS))
    assert (ours - noise).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_i2vgen_xls_trajectory_is_the_pipelines(tmp_path: Path) -> None:
    """Image and text, encoded by CLIP and autoencoder. The unconditional half of the pipeline's
    guidance sees the image's latents, but not its embedding.
    """
    from PIL import Image

    pipeline = pipeline_folder("I2VGenXL", tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    # The pipeline draws the image's latents; ours are their mean.
    at_mean = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.mode
    with pytest.MonkeyPatch.context() as patch:
        kind = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample"
        patch.setattr(kind, lambda self, *_: at_mean(self))
        noise = seeded_noise([1], 4, GRID)
        theirs = pipeline(
            PROMPTS[0],
            Image.fromarray(pixels),
            height=16,
            width=16,
            num_frames=3,
            target_fps=7,
            num_inference_steps=4,
            guidance_scale=3.0,
            latents=noise,
            output_type="latent",
            clip_skip=None,
        ).frames
    video = torch.tensor(pixels).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    tokenizer = pretrained_tokenizer(tmp_path)
    latents = tokenizer.encode(video.expand(-1, -1, 3, -1, -1))
    first = torch.zeros(1, 1, *latents.shape[2:], dtype=torch.bool)
    first[:, :, 0] = True
    frames = FirstFrameAndPosition()(latents, first)
    encoder = ClipEmbedding(4, 16, tmp_path)
    image = encoder.known(latents, first, lambda _: video)
    text = PretrainedText(tmp_path, dtype="float32", padded=True)
    condition = replace(text(PROMPTS[:1]), concat_latents=frames).joined(image)
    null = replace(text.null(1), concat_latents=frames)
    guided = ClassifierFreeGuidance(pretrained_denoiser(tmp_path, fps=7.0).eval(), null, 3.0)
    ours = _ddim(pipeline, tmp_path, guided, noise, condition)
    assert (ours - noise).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_wans_image_to_video_shows_the_first_frame_at_time_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wan 2.2 5B, whose tokens have times of their own."""
    from PIL import Image

    # Its pipeline mends prompts by a package that is not needed for plain ones.
    module = "diffusers.pipelines.wan.pipeline_wan_i2v.ftfy"
    monkeypatch.setattr(module, SimpleNamespace(fix_text=str), raising=False)
    made = pipeline_folder("Wan", tmp_path)
    parts = {k: v for k, v in made.components.items() if k != "transformer_2"}
    pipeline = diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True)
    pipeline.set_progress_bar_config(disable=True)
    text = PretrainedText(tmp_path, dtype="float32")
    pixels = np.random.default_rng(0).integers(0, 255, (16, 32, 3), dtype=np.uint8)
    noise = seeded_noise([1], 4, TokenGrid(3, 4, 8))
    size = {"num_frames": 9, "height": 16, "width": 32}
    steps = {"num_inference_steps": 4, "guidance_scale": 3.0}
    theirs = pipeline(
        Image.fromarray(pixels), PROMPTS[0], **size, **steps, latents=noise, output_type="latent"
    ).frames
    tokenizer, denoiser = pretrained_tokenizer(tmp_path), pretrained_denoiser(tmp_path).eval()
    video = torch.tensor(pixels).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    latents = torch.zeros_like(noise)
    latents[:, :, :1] = tokenizer.encode(video)
    first = torch.zeros(1, 1, *noise.shape[2:], dtype=torch.bool)
    first[:, :, 0] = True
    process = pretrained_objective(tmp_path).process
    space = LatentSpace(process, denoiser.patch, tokenizer.decode, tokenizer.encode)
    frames = KnownFrames(latents, first)
    shown = TimeZeroConditioning().wrapper(frames, noise, torch.randn_like, space)
    guided = ClassifierFreeGuidance(shown(denoiser), text.null(1), 3.0)
    ours = euler(guided, noise, pipeline.scheduler.sigmas, text(PROMPTS[:1]), process)
    ours = frames.known(denoiser.patch, noise.device).place(ours, latents)
    assert (ours - noise).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_wan_takes_mask_latents_and_patches_of_an_image(tmp_path: Path) -> None:
    theirs, ours = _saved("WanImageToVideo", tmp_path)
    x, condition = _inputs(5)
    first = torch.zeros(2, 1, 3, 4, 6, dtype=torch.bool)
    first[:, :, 0] = True
    latents, image = torch.randn_like(x), torch.randn(2, 257, 16)
    text = torch.cat([condition.tokens * condition.mask[..., None], torch.zeros(2, 507, 16)], dim=1)
    mask = first.float().expand(-1, 4, -1, -1, -1)
    expected = theirs(torch.cat([x, mask, latents], 1), 1000 * T, text, image[..., :12]).sample
    assert expected.std() > 1e-2
    shown = replace(condition, concat_latents=torch.cat([latents, first.float()], dim=1))
    shown = shown.joined(ImageTokens(image, torch.ones(2, 257).bool()))
    torch.testing.assert_close(ours(x, T, shown), expected, **CLOSE)
    none = torch.cat([x, torch.zeros(2, 8, 3, 4, 6)], dim=1)
    expected = theirs(none, 1000 * T, text, torch.zeros(2, 257, 12)).sample
    torch.testing.assert_close(ours(x, T, condition), expected, **CLOSE)
    without_tokens = replace(condition, concat_latents=shown.concat_latents)
    with pytest.raises(ValueError, match=r"257 tokens of the image beside .* must be ClipPatches"):
        ours(x, T, without_tokens)
    network("WanImageToVideo", pos_embed_seq_len=514).save_config(tmp_path)
    with pytest.raises(ValueError, match="pos_embed_seq_len is set: Wan's first and last frames"):
        pretrained_denoiser(tmp_path)


@torch.no_grad()
def test_wans_trajectory_from_an_image_is_the_pipelines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wan 2.1, which sees the image as latents before grey frames, and as CLIP's patches."""
    from PIL import Image

    module = "diffusers.pipelines.wan.pipeline_wan_i2v.ftfy"
    monkeypatch.setattr(module, SimpleNamespace(fix_text=str), raising=False)
    pipeline = pipeline_folder("WanImageToVideo", tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    grid = TokenGrid(3, 8, 8)
    noise = seeded_noise([1], 4, grid)
    size = {"num_frames": 9, "height": 32, "width": 32}
    steps = {"num_inference_steps": 4, "guidance_scale": 3.0}
    theirs = pipeline(
        Image.fromarray(pixels), PROMPTS[0], **size, **steps, latents=noise, output_type="latent"
    ).frames
    video = torch.tensor(pixels).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    parts = Pipeline(tmp_path)
    tokenizer, denoiser = parts.tokenizer(), parts.denoiser(16.0).eval()
    frames = parts.known_frames()
    assert frames is not None
    frames = frames.build(4, 16, 0.1)
    latents = torch.zeros_like(noise)
    latents[:, :, :1] = tokenizer.encode(video)
    first = torch.zeros(1, 1, *noise.shape[2:], dtype=torch.bool)
    first[:, :, 0] = True
    process = pretrained_objective(tmp_path).process
    # The image itself in place of what the autoencoder makes of its latents.
    space = LatentSpace(process, denoiser.patch, lambda _: video, tokenizer.encode)
    shown = frames.wrapper(KnownFrames(latents, first), noise, torch.randn_like, space)
    text = PretrainedText(tmp_path, dtype="float32")
    guided = ClassifierFreeGuidance(shown(denoiser), text.null(1), 3.0)
    ours = euler(guided, noise, pipeline.scheduler.sigmas, text(PROMPTS[:1]), process)
    assert (ours - noise).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_what_the_u_nets_and_hunyuanvideo_cannot_do_is_refused(tmp_path: Path) -> None:
    network("TextToVideoSD").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="UNet3DConditionModel cannot recompute its blocks"):
        pretrained_denoiser(tmp_path, activation_checkpointing=True)
    network("HunyuanVideo", image_condition_type="token_replace").save_config(tmp_path)
    with pytest.raises(ValueError, match="image_condition_type = token_replace: of HunyuanVideo"):
        pretrained_denoiser(tmp_path)
