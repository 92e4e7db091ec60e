"""diffusers' autoencoders give through the contract what they give by themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sora_lightning.tokenizers import CausalTokenizer, VideoTokenizer, pretrained_tokenizer
from sora_lightning.types import Compression

diffusers = pytest.importorskip("diffusers")

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
WAN = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.5, 2.0, 1.0],
    "scale_factor_spatial": 4,
}
CASES = {
    "image": (
        "AutoencoderKL",
        {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
            "latent_channels": 4,
            "scaling_factor": 0.5,
            "shift_factor": 0.25,
        },
        Compression(1, 2, 2),
        (5, 8, 12),
    ),
    "wan": ("AutoencoderKLWan", WAN, Compression(4, 4, 4), (9, 8, 12)),
    "wan of 2.2": (
        "AutoencoderKLWan",
        {
            **WAN,
            "decoder_base_dim": 8,
            "temperal_downsample": [False, True],
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
        },
        Compression(2, 8, 8),
        (9, 16, 24),
    ),
    "cogvideox": (
        "AutoencoderKLCogVideoX",
        {
            "block_out_channels": (8, 8, 16),
            "down_block_types": ("CogVideoXDownBlock3D",) * 3,
            "up_block_types": ("CogVideoXUpBlock3D",) * 3,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": 4,
            "scaling_factor": 0.7,
        },
        Compression(4, 4, 4),
        (17, 8, 12),
    ),
    "ltx": (
        "AutoencoderKLLTXVideo",
        {
            "block_out_channels": (8, 16),
            "decoder_block_out_channels": (8, 8),
            "layers_per_block": (1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1),
            "spatio_temporal_scaling": (True, False),
            "decoder_spatio_temporal_scaling": (True, False),
            "decoder_inject_noise": (False, False, False),
            "upsample_residual": (False, False),
            "upsample_factor": (1, 1),
            "down_block_types": ("LTXVideoDownBlock3D",) * 2,
            "timestep_conditioning": True,
            "latent_channels": 4,
            "patch_size": 2,
            "scaling_factor": 0.9,
        },
        Compression(2, 4, 4),
        (9, 8, 12),
    ),
    "hunyuan": (
        "AutoencoderKLHunyuanVideo",
        {
            "block_out_channels": (8, 8, 8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": 4,
            "scaling_factor": 0.4,
        },
        Compression(4, 8, 8),
        (21, 16, 16),
    ),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest, tmp_path: Path):
    """diffusers' network with random weights, our tokenizer of its folder, geometry, a clip."""
    name, config, compression, size = CASES[request.param]
    vae = getattr(diffusers, name)(**config).eval()
    for parameter in vae.parameters():
        nn.init.normal_(parameter, mean=0.02, std=0.15)
    if request.param == "ltx":  # its statistics are weights
        vae.latents_mean.normal_()
        vae.latents_std.uniform_(0.5, 2)
    vae.save_pretrained(tmp_path)
    return vae, pretrained_tokenizer(tmp_path), compression, torch.rand(2, 3, *size) * 2 - 1


@torch.no_grad()
def test_latents_and_pixels_are_diffusers_own(case) -> None:
    vae, tokenizer, compression, video = case
    assert tokenizer.compression == compression
    assert tokenizer.latent_channels == 4
    if isinstance(vae, diffusers.AutoencoderKL):
        frames = video.transpose(1, 2).flatten(0, 1)
        theirs = vae.encode(frames).latent_dist
        mean = theirs.mean.unflatten(0, (2, -1)).transpose(1, 2)
        pixels = vae.decode(theirs.mean).sample.unflatten(0, (2, -1)).transpose(1, 2)
    else:
        theirs = vae.encode(video).latent_dist
        time = [torch.zeros(2)] if isinstance(vae, diffusers.AutoencoderKLLTXVideo) else []
        mean, pixels = theirs.mean, vae.decode(theirs.mean, *time).sample
    posterior = tokenizer.posterior(video)
    torch.testing.assert_close(posterior.mean, mean, **CLOSE)
    assert mean.std() > 1e-3
    assert posterior.log_variance.std() > 0
    torch.testing.assert_close(
        tokenizer.decode_raw(mean).clamp(-1, 1), pixels.clamp(-1, 1), **CLOSE
    )
    assert pixels.shape == video.shape
    again = tokenizer.decode(tokenizer.encode(video))
    torch.testing.assert_close(again, pixels.clamp(-1, 1), **CLOSE)
    image = tokenizer.encode(video[:, :, :1])
    assert tokenizer.decode(image).shape == video[:, :, :1].shape


@torch.no_grad()
def test_latents_are_normalised_by_the_published_statistics(case) -> None:
    vae, tokenizer, _, video = case
    raw = tokenizer.posterior(video).mean
    expected = {
        "AutoencoderKL": lambda z: (z - 0.25) * 0.5,
        "AutoencoderKLWan": lambda z: (
            (z - torch.tensor(WAN["latents_mean"])[:, None, None, None])
            / torch.tensor(WAN["latents_std"])[:, None, None, None]
        ),
        "AutoencoderKLLTXVideo": lambda z: (
            (z - vae.latents_mean[:, None, None, None]) * 0.9 / vae.latents_std[:, None, None, None]
        ),
        "AutoencoderKLCogVideoX": lambda z: z * 0.7,
        "AutoencoderKLHunyuanVideo": lambda z: z * 0.4,
    }[type(vae).__name__](raw)
    torch.testing.assert_close(tokenizer.encode(video), expected)


@torch.no_grad()
def test_those_that_see_no_future_run_in_pieces(case) -> None:
    """The pasts are values: a piece may be run twice."""
    vae, tokenizer, compression, video = case
    causal = isinstance(vae, diffusers.AutoencoderKL | diffusers.AutoencoderKLWan)
    assert isinstance(tokenizer, CausalTokenizer) == causal
    if not causal:
        return
    whole, step = tokenizer.encode(video), compression.frames
    pieces = [video[:, :, :1], *video[:, :, 1:].split(2 * step, dim=2)]
    latents = list(tokenizer.encode_pieces(pieces))
    torch.testing.assert_close(torch.cat(latents, dim=2), whole, **CLOSE)
    decoded = torch.cat(list(tokenizer.decode_pieces(latents)), dim=2)
    torch.testing.assert_close(decoded, tokenizer.decode(whole), **CLOSE)
    changed = video.clone()
    changed[:, :, 1:] *= -1
    torch.testing.assert_close(tokenizer.encode(changed)[:, :, :1], whole[:, :, :1], **CLOSE)
    _, past = tokenizer.posterior_step(pieces[0], None)
    once, _ = tokenizer.posterior_step(pieces[1], past)
    twice, _ = tokenizer.posterior_step(pieces[1], past)
    assert torch.equal(once.mean, twice.mean)


@torch.no_grad()
def test_allegros_latent_frames_are_all_of_four_frames(tmp_path: Path) -> None:
    """The comparison is for one tile: diffusers' class encodes in tiles alone."""
    vae = diffusers.AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16
    ).eval()
    for parameter in vae.parameters():
        nn.init.normal_(parameter, mean=0.02, std=0.15)
    vae.save_pretrained(tmp_path)
    tokenizer = pretrained_tokenizer(tmp_path)
    assert tokenizer.compression == Compression(4, 8, 8)
    video = torch.rand(2, 3, 21, 16, 16) * 2 - 1
    vae.enable_tiling()
    for clip in video.split(1):
        whole = torch.cat([clip[:, :, :1]] * 3 + [clip], dim=2)
        theirs = vae.encode(whole).latent_dist
        posterior = tokenizer.posterior(clip)
        torch.testing.assert_close(posterior.mean, theirs.mean, **CLOSE)
        torch.testing.assert_close(posterior.log_variance, theirs.logvar, **CLOSE)
        pixels = vae.decode(theirs.mean).sample.transpose(1, 2)[:, :, 3:]  # it gives frames first
        torch.testing.assert_close(tokenizer.decode_raw(theirs.mean), pixels, **CLOSE)
    torch.testing.assert_close(tokenizer.encode(video), tokenizer.posterior(video).mean * 0.13)
    image = tokenizer.encode(video[:, :, :1])
    assert tokenizer.decode(image).shape == (2, 3, 1, 16, 16)


def test_cogvideox_refuses_lengths_that_its_decoder_cannot_give_back(tmp_path: Path) -> None:
    name, config, *_ = CASES["cogvideox"]
    getattr(diffusers, name)(**config).save_pretrained(tmp_path)
    tokenizer = pretrained_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"5 frames: CogVideoX's .* takes 1 \+ a multiple of 8"):
        tokenizer.encode(torch.zeros(1, 3, 5, 8, 8))
    with pytest.raises(ValueError, match="13 frames: CogVideoX's"):
        tokenizer.decode(torch.zeros(1, 4, 4, 2, 2))


@pytest.mark.filterwarnings("ignore:.*meta parameter")
def test_a_specification_builds_it_again_without_the_folder(tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser

    name, config, *_ = CASES["wan"]
    getattr(diffusers, name)(**config).save_pretrained(tmp_path)
    tokenizer = pretrained_tokenizer(tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(VideoTokenizer, "tokenizer")
    parsed = parser.parse_object({"tokenizer": tokenizer.specification})
    again = parser.instantiate(parsed).tokenizer
    again.load_state_dict(tokenizer.state_dict())
    assert again.fingerprint() == tokenizer.fingerprint()
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    with torch.device("meta"):  # as the command line reads the geometry
        assert pretrained_tokenizer(tmp_path).compression == tokenizer.compression


def test_folders_that_hold_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: there is no config\.json here"):
        pretrained_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(ValueError, match="holds a VQModel; a tokenizer is one of AutoencoderKL, "):
        pretrained_tokenizer(tmp_path)
    name, config, *_ = CASES["wan"]
    getattr(diffusers, name)(**config).save_pretrained(tmp_path)
    getattr(diffusers, name)(**{**config, "num_res_blocks": 2}).save_config(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights of a AutoencoderKLWan, .*resnets"):
        pretrained_tokenizer(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="the weights cannot be read"):
        pretrained_tokenizer(tmp_path)


def test_without_diffusers_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install 'sora-lightning\[reference\]'"):
        pretrained_tokenizer(tmp_path)
