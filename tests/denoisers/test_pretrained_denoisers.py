"""Video transformers of diffusers give through our interface what they give by themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sora_lightning.conditioning import PretrainedText
from sora_lightning.denoisers import Denoiser, pretrained_denoiser
from sora_lightning.diffusion import (
    ClassifierFreeGuidance,
    Process,
    RectifiedFlow,
    euler,
    pretrained_objective,
    pretrained_times,
)
from sora_lightning.generation import SamplingConfig, VideoGenerator
from sora_lightning.generation.generator import seeded_noise
from sora_lightning.generation.sampling_config import GuidanceConfig
from sora_lightning.tokenizers import pretrained_tokenizer
from sora_lightning.types import Condition, PackedLatents, TokenGrid

pytest.importorskip("diffusers")
from tests.denoisers.pipelines import network, pipeline_folder

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PROMPTS = ["a red circle moves left", "a blue square"]
# Text tokens, and whether the pipeline's text encoder reads padding.
TEXT: dict[str, dict[str, Any]] = {
    "Wan": {},
    "LTX": {"max_tokens": 12, "padded": True},
    "CogVideoX": {"max_tokens": 226, "padded": True},
}


def _saved(name: str, folder: Path, **changes: Any) -> tuple[Any, Denoiser]:
    theirs = network(name, **changes)
    theirs.save_pretrained(folder)
    return theirs, pretrained_denoiser(folder).eval()


def _inputs(num_tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    torch.manual_seed(1)
    mask = torch.arange(num_tokens) < torch.tensor([[num_tokens], [2]])
    tokens = torch.randn(2, num_tokens, 16)
    t = torch.tensor([0.25, 0.75])
    return torch.randn(2, 4, 3, 4, 6), t, Condition(tokens, mask, tokens.mean(1))


@torch.no_grad()
def test_wan_pads_texts_with_zeros_to_512(tmp_path: Path) -> None:
    theirs, ours = _saved("Wan", tmp_path)
    x, t, condition = _inputs()
    text = torch.zeros(2, 512, 16)
    text[0, :5], text[1, :2] = condition.tokens[0], condition.tokens[1, :2]
    expected = theirs(x, 1000 * t, text).sample
    assert expected.std() > 1e-2
    torch.testing.assert_close(ours(x, t, condition), expected, **CLOSE)
    of_tokens = t[:, None].expand(2, 3 * 2 * 3)
    torch.testing.assert_close(ours(x, of_tokens, condition), expected, **CLOSE)


@torch.no_grad()
def test_ltx_masks_padding_and_has_positions_in_seconds(tmp_path: Path) -> None:
    theirs, _ = _saved("LTX", tmp_path)
    ours = pretrained_denoiser(tmp_path, fps=8.0).eval()
    x, t, condition = _inputs()
    flat = x.flatten(2).transpose(1, 2)
    size = {"num_frames": 3, "height": 4, "width": 6}
    scale = {"rope_interpolation_scale": (8 / 8, 32, 32)}
    mask = condition.mask.float()
    expected = theirs(flat, condition.tokens, 1000 * t, mask, **size, **scale).sample
    expected = expected.transpose(1, 2).reshape(x.shape)
    assert expected.std() > 1e-2
    torch.testing.assert_close(ours(x, t, condition), expected, **CLOSE)
    at_25_fps = pretrained_denoiser(tmp_path).eval()(x, t, condition)
    assert (at_25_fps - expected).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("rotary", [False, True])
def test_cogvideox_counts_steps_from_zero(rotary: bool, tmp_path: Path) -> None:
    theirs, ours = _saved("CogVideoX", tmp_path, use_rotary_positional_embeddings=rotary)
    x, t, condition = _inputs(226)
    angles = None
    if rotary:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        # A grid of 2 x 3 tokens in the training's 2 x 2: its rows are 1.33, centred.
        angles = get_3d_rotary_pos_embed(16, ((0, 0), (1, 2)), (2, 3), 3)
    frames_first = x.transpose(1, 2)
    steps = torch.tensor([249, 749])
    expected = theirs(frames_first, condition.tokens, steps, image_rotary_emb=angles).sample
    expected = expected.transpose(1, 2)
    assert expected.std() > 1e-2
    torch.testing.assert_close(ours(x, t, condition), expected, **CLOSE)


@torch.no_grad()
def test_a_pack_is_seen_clip_by_clip(tmp_path: Path) -> None:
    _, ours = _saved("Wan", tmp_path)
    x, t, condition = _inputs()
    clips = (x[0], x[1, :, :2])
    packed = ours(PackedLatents(clips), t, condition)
    torch.testing.assert_close(packed.clips[0], ours(x, t, condition)[0], **CLOSE)
    assert packed.clips[1].shape == clips[1].shape


@torch.no_grad()
@pytest.mark.parametrize("name", ["LTX", "CogVideoX"])
def test_a_sampled_trajectory_is_the_pipelines(name: str, tmp_path: Path) -> None:
    """Scheduler, text encoders, guidance and network together, from one noise."""
    pipeline = pipeline_folder(name, tmp_path)
    tokenizer = pretrained_tokenizer(tmp_path / "vae")
    text = PretrainedText(
        tmp_path / "text_encoder", tmp_path / "tokenizer", dtype="float32", **TEXT[name]
    )
    objective = pretrained_objective(tmp_path / "scheduler")
    generator = VideoGenerator(
        tokenizer,
        text,
        pretrained_denoiser(tmp_path / "transformer").eval(),
        process=objective.process,
        training_shift=pretrained_times(tmp_path / "scheduler").sampling_shift,
        sampling=SamplingConfig(num_steps=4, guidance=GuidanceConfig(scale=3.0)),
    )
    frames, height, width = {"LTX": (17, 64, 96), "CogVideoX": (9, 16, 16)}[name]
    grid = TokenGrid(3, *((2, 3) if name == "LTX" else (4, 4)))
    noise = seeded_noise([1, 2], 4, grid)
    given = noise.flatten(2).transpose(1, 2) if name == "LTX" else noise.transpose(1, 2)
    theirs = pipeline(
        PROMPTS,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=given,
        output_type="latent",
        max_sequence_length=TEXT[name]["max_tokens"],
        **({"frame_rate": 25} if name == "LTX" else {}),
    ).frames
    theirs = theirs.transpose(1, 2).reshape(noise.shape)
    ours = generator.latents(PROMPTS, grid, [1, 2])
    assert (ours - noise).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_wans_trajectory_at_its_schedulers_times(tmp_path: Path) -> None:
    pipeline = pipeline_folder("Wan", tmp_path)
    text = PretrainedText(tmp_path / "text_encoder", tmp_path / "tokenizer", dtype="float32")
    denoiser = pretrained_denoiser(tmp_path / "transformer").eval()
    process = pretrained_objective(tmp_path / "scheduler").process
    assert process == Process(RectifiedFlow())
    noise = seeded_noise([1, 2], 4, TokenGrid(3, 4, 8))
    size = {"num_frames": 9, "height": 16, "width": 32}
    steps = {"num_inference_steps": 4, "guidance_scale": 3.0}
    theirs = pipeline(PROMPTS, **size, **steps, latents=noise, output_type="latent").frames
    times = pipeline.scheduler.sigmas
    guided = ClassifierFreeGuidance(denoiser, text.null(2), 3.0)
    ours = euler(guided, noise, times, text(PROMPTS), process)
    assert (ours - noise).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*meta parameter")
def test_a_specification_builds_it_again_without_the_folder(tmp_path: Path) -> None:
    from collections.abc import Callable

    from jsonargparse import ArgumentParser

    _, ours = _saved("LTX", tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=Callable[[int, int], Denoiser])
    (tmp_path / "config.json").unlink()
    parsed = parser.parse_object({"part": ours.specification})
    again = parser.instantiate(parsed).part
    again.load_state_dict(ours.state_dict())
    x, t, condition = _inputs()
    torch.testing.assert_close(again.eval()(x, t, condition), ours(x, t, condition))
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_on_the_meta_device_no_weights_are_read(tmp_path: Path) -> None:
    _, ours = _saved("Wan", tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with torch.device("meta"):
        meta = pretrained_denoiser(tmp_path)
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert meta.state_dict().keys() == ours.state_dict().keys()


def test_what_fits_no_denoiser_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: there is no config\.json here; .*transformer"):
        pretrained_denoiser(tmp_path / "nowhere")
    _, ours = _saved("CogVideoX", tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer has 16 latent channels, and this Cog.* 4"):
        ours.factory(16, 16)
    with pytest.raises(ValueError, match=r"conditioner's tokens have width 8, and this Cog.*16"):
        ours.factory(4, 8)
    x, t, condition = _inputs(227)
    with pytest.raises(ValueError, match=r"227 text tokens, and the network takes 226: set .*max_"):
        ours(x, t, condition)
    with pytest.raises(ValueError, match="CogVideoXTransformer3DModel takes one time for each"):
        ours(x, t[:, None].expand(2, 18), condition)
    with pytest.raises(ValueError, match="dtype = 'bfloat16': all weights train, in float32"):
        pretrained_denoiser(tmp_path, dtype="bfloat16")
    network("Wan", in_channels=9).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes 9 channels and predicts 4: only networks from"):
        pretrained_denoiser(tmp_path)
    network("CogVideoX", patch_size_t=2).save_config(tmp_path)
    with pytest.raises(
        ValueError, match=r"CogVideoX 1\.5 is not supported: its tokens hold several"
    ):
        pretrained_denoiser(tmp_path)
    network("Wan").save_pretrained(tmp_path)
    network("Wan", num_layers=3).save_config(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights of a WanTransformer3DModel, .* blocks\.2"):
        pretrained_denoiser(tmp_path)
    network("LTX").save_config(tmp_path)  # and weights of another class
    with pytest.raises(ValueError, match=r"the weights cannot be read: |lacks weights of a LTX"):
        pretrained_denoiser(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="the weights cannot be read: "):
        pretrained_denoiser(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    with pytest.raises(ValueError, match="holds a AutoencoderKLWan; a denoiser is one of WanTran"):
        pretrained_denoiser(tmp_path)


def test_without_diffusers_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install 'sora-lightning\[reference\]'"):
        pretrained_denoiser(tmp_path)
