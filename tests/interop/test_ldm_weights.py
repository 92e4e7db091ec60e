"""Latent diffusion's autoencoder: the public sizes, diffusers' output, names there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sora_lightning.__main__ import main
from sora_lightning.interop import converted_tokenizer, ldm, ldm_diffusers
from sora_lightning.tokenizers.ldm import LDMTokenizer
from sora_lightning.types import Compression
from tests.interop.golden import seeded

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def diffusers_kl():
    """Three levels of two widths: blocks with and without a shortcut on both sides."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=4,
        sample_size=64,
    ).eval()
    state = model.state_dict()
    model.load_state_dict({name: seeded(name, w.shape) for name, w in state.items()})
    return model


def compvis(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under CompVis' names, renamed by way of this package's."""
    return ldm.to_theirs(ldm_diffusers.to_ours(weights))


@pytest.mark.parametrize(
    ("arguments", "num_parameters", "side"),
    [
        ({}, 83_653_863, 8),
        ({"latent_channels": 3, "multipliers": (1, 2, 4)}, 55_312_063, 4),
    ],
    ids=["f8", "f4"],
)
def test_the_public_sizes(arguments: dict, num_parameters: int, side: int) -> None:
    with torch.device("meta"):
        tokenizer = LDMTokenizer(**arguments)
    assert sum(p.numel() for p in tokenizer.parameters()) == num_parameters
    assert tokenizer.compression == Compression(1, side, side)
    if not arguments:
        assert sum(p.numel() for p in tokenizer.encoder.parameters()) == 34_163_592
        assert sum(p.numel() for p in tokenizer.decoder.parameters()) == 49_490_179


@torch.no_grad()
def test_the_public_cost_of_a_frame() -> None:
    """Multiplications for 256 x 256 pixels: 136.4 G and 311.1 G."""
    with torch.device("meta"):
        tokenizer = LDMTokenizer()
        sides = {
            136.4: (tokenizer.image_moments, torch.empty(1, 3, 256, 256)),
            311.1: (tokenizer.decode_images, torch.empty(1, 4, 32, 32)),
        }
        for published, (function, x) in sides.items():
            with FlopCounterMode(display=False) as counter:
                function(x)
            assert counter.get_total_flops() / 2e9 == pytest.approx(published, abs=0.05)


@torch.no_grad()
def test_it_gives_diffusers_output_on_every_frame() -> None:
    model = diffusers_kl()
    tokenizer = ldm_diffusers.to_ours(model.state_dict()).build()["tokenizer"]
    assert isinstance(tokenizer, LDMTokenizer)
    video = torch.rand(2, 3, 3, 16, 24) * 2 - 1
    posterior = tokenizer.posterior(video)
    for i in range(3):
        theirs = model.encode(video[:, :, i]).latent_dist
        torch.testing.assert_close(posterior.mean[:, :, i], theirs.mean, **CLOSE)
        torch.testing.assert_close(posterior.log_variance[:, :, i], theirs.logvar, **CLOSE)
        pixels = model.decode(theirs.mean).sample
        ours = tokenizer.decode_raw(posterior.mean)[:, :, i]
        torch.testing.assert_close(ours, pixels, **CLOSE)
    assert posterior.mean.std() > 0.01
    torch.testing.assert_close(tokenizer.encode(video), posterior.mean * 0.18215)


def test_names_are_those_of_the_public_file_and_come_back() -> None:
    """A few of the keys of ``kl-f8``; CompVis numbers the decoder's levels from the finest."""
    weights = diffusers_kl().state_dict()
    theirs = compvis(weights)
    assert len(theirs) == len(weights)
    for name in (
        "encoder.conv_in.weight",
        "encoder.down.0.block.1.norm2.bias",
        "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.down.1.downsample.conv.bias",
        "encoder.mid.attn_1.proj_out.weight",
        "decoder.mid.block_2.conv1.weight",
        "decoder.up.2.upsample.conv.weight",
        "decoder.up.0.block.0.nin_shortcut.weight",
        "decoder.norm_out.weight",
        "quant_conv.weight",
    ):
        assert name in theirs
    assert theirs["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    coarse = theirs["decoder.up.2.block.0.conv1.weight"]
    assert torch.equal(coarse, weights["decoder.up_blocks.0.resnets.0.conv1.weight"])
    back = ldm_diffusers.to_theirs(ldm.to_ours(theirs))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_whole_models_trainings_and_older_names_are_read() -> None:
    weights = diffusers_kl().state_dict()
    alone, ours = compvis(weights), ldm_diffusers.to_ours(weights).weights

    def same(other: dict[str, Tensor]) -> bool:
        return all(torch.equal(other[name], ours[name]) for name in ours)

    whole = {f"first_stage_model.{name}": w for name, w in alone.items()}
    assert same(ldm.to_ours({**whole, "model.diffusion_model.x": torch.zeros(1)}).weights)
    assert same(ldm.to_ours({**alone, "loss.logvar": torch.zeros(())}).weights)
    older = {
        name.replace(".to_q.", ".query.").replace(".to_out.0.", ".proj_attn."): w
        for name, w in weights.items()
    }
    assert older.keys() != weights.keys()
    assert same(ldm_diffusers.to_ours(older).weights)


def test_weights_without_a_place_are_named() -> None:
    weights = compvis(diffusers_kl().state_dict())
    with pytest.raises(ValueError, match=r"no rule takes: encoder\.extra"):
        ldm.to_ours({**weights, "encoder.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"missing: encoder\.down\.0.* not CompVis' AutoencoderKL"):
        ldm.to_ours(diffusers_kl().state_dict())


def test_a_converted_file_is_a_tokenizer_for_a_yaml(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "vae.safetensors", tmp_path / "ours.safetensors"
    save_file({k: w.contiguous() for k, w in diffusers_kl().state_dict().items()}, theirs)
    files = ["--input", str(theirs), "--output", str(ours)]
    assert main(["convert", "--source", "ldm-diffusers", "--target", "sora-lightning", *files]) == 0
    tokenizer = converted_tokenizer(ours)
    assert tokenizer.specification["class_path"] == "sora_lightning.tokenizers.ldm.LDMTokenizer"
    assert tokenizer.specification["init_args"]["multipliers"] == [1, 2, 2]
    assert not any(p.requires_grad for p in tokenizer.parameters())
    assert tokenizer.encode(torch.zeros(1, 3, 2, 8, 12)).shape == (1, 4, 2, 2, 3)
    with pytest.raises(ValueError, match=r"missing\.safetensors: no such file"):
        converted_tokenizer(tmp_path / "missing.safetensors")
