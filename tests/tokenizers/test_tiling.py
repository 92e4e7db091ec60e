"""Tiles: exact where a tokenizer sees no further than the margin, bounded where it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sora_lightning.__main__ import main
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems import TokenizerSystem
from sora_lightning.tokenizers import CausalTokenizer, ConvTokenizer, Tiling, ViViTTokenizer
from sora_lightning.tokenizers.ldm import LDMTokenizer
from sora_lightning.tokenizers.tiling import TiledTokenizer, _Span
from sora_lightning.types import VideoBatch

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def conv(**options: object) -> ConvTokenizer:
    """4 x 4 x 4. A latent depends on pixels up to 7 latent positions away, a pixel on latents 6.5
    away.
    """
    tokenizer = ConvTokenizer(
        4, (8, 16, 16), (True, True), (True, False), patch=2, blocks_per_level=1, **options
    )
    for parameter in tokenizer.parameters():  # zero-initialised layers must count too
        torch.nn.init.normal_(parameter, std=0.2)
    return tokenizer.eval()


def pattern(num_frames: int, height: int, width: int) -> Tensor:
    return torch.rand(1, 3, num_frames, height, width) * 2 - 1


@pytest.mark.parametrize("length", [1, 12, 13, 20, 29, 64, 101])
@pytest.mark.parametrize(("tile", "overlap"), [(12, 4), (12, 1), (16, 5)])
def test_weights_add_up_to_one_and_change_by_a_ramps_step(
    length: int, tile: int, overlap: int
) -> None:
    spans = [span.times(2) for span in _Span.all(length, tile, overlap)]
    assert all(span.stop - span.start <= 2 * tile for span in spans)
    total = torch.zeros(2 * length)
    for span in spans:
        weights = span.weights(2, total)
        total[span.slice] += weights
        ramp = 2 * (overlap - 2 * (overlap // 4))
        assert weights.diff().abs().max() <= 1 / ramp + 1e-6
    torch.testing.assert_close(total, torch.ones(2 * length))


@torch.no_grad()
@pytest.mark.parametrize("axis", [3, 4], ids=["rows", "columns"])
def test_convolutions_by_tiles_are_those_of_the_whole_frame(axis: int) -> None:
    """A margin of 7 positions, which is what these convolutions see: latents, pixels, and with them
    the colour of every tile.
    """
    tokenizer, video = conv(), pattern(5, 420, 8)
    video = video if axis == 3 else video.mT
    tiled = Tiling(tile=336, overlap=112)(tokenizer)
    latents, pixels = tokenizer.encode(video), tokenizer.decode_raw(tokenizer.encode(video))
    torch.testing.assert_close(tiled.encode(video), latents, **CLOSE)
    torch.testing.assert_close(tiled.decode_raw(latents), pixels, **CLOSE)
    narrow = Tiling(tile=60, overlap=20)(tokenizer)
    assert (narrow.encode(video) - latents).abs().max() > 1e-3


NETWORKS = {
    "convolutions": conv,
    "transformer": lambda: ViViTTokenizer(4, (4, 4, 4), TransformerSize(2, 24, 2)),
    "latent diffusion": lambda: LDMTokenizer(4, 32, (1, 1, 2), 1),
}


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_every_value_lies_between_the_tiles_and_seams_have_no_step(name: str) -> None:
    tokenizer = NETWORKS[name]().eval()
    latents = torch.randn(1, 4, 2, 20, 3)
    whole = tokenizer.decode_raw(latents)
    tiled = Tiling(tile=48, overlap=16)(tokenizer).decode_raw(latents)
    spans = _Span.all(20, 12, 4)
    assert [(span.start, span.stop) for span in spans] == [(0, 12), (8, 20)]
    one, two = (tokenizer.decode_raw(latents[:, :, :, span.slice]) for span in spans)
    assert torch.equal(tiled[..., :36, :], one[..., :36, :])  # up to the margin's end
    torch.testing.assert_close(tiled[..., 44:, :], two[..., 12:, :])
    a, b, blended = one[..., 32:, :], two[..., :16, :], tiled[..., 32:48, :]
    assert (blended <= torch.maximum(a, b) + 1e-5).all()
    assert (blended >= torch.minimum(a, b) - 1e-5).all()
    worst = torch.maximum((a - whole[..., 32:48, :]).abs(), (b - whole[..., 32:48, :]).abs())
    assert ((blended - whole[..., 32:48, :]).abs() <= worst + 1e-5).all()
    disagreement = (a - b).abs()
    assert disagreement.max() > 1e-3
    own = torch.maximum(a.diff(dim=3).abs(), b.diff(dim=3).abs())
    assert (blended.diff(dim=3).abs() <= own + disagreement[..., :-1, :] / 8 + 1e-5).all()


@torch.no_grad()
def test_tiles_have_the_colour_of_the_whole_frame() -> None:
    """With less margin than the convolutions see, and weights as a training starts from: 1 % of the
    range of colours at most.
    """
    tokenizer = ConvTokenizer(
        16, (8, 16, 32), (True, True), (True, True), patch=2, blocks_per_level=1
    ).eval()
    video = pattern(1, 6, 8).repeat_interleave(32, dim=3).repeat_interleave(32, dim=4)
    whole, tiled = (
        t.decode_raw(t.posterior(video).mean) for t in (tokenizer, Tiling(96, 32)(tokenizer))
    )
    assert (tiled - whole).abs().max() > 0
    means = torch.nn.functional.avg_pool2d((tiled - whole)[0], 64)
    assert means.abs().max() < 0.02


@torch.no_grad()
def test_tiles_run_piece_by_piece() -> None:
    tokenizer, video = conv(), pattern(13, 40, 56)
    tokenizer.set_latent_statistics(torch.randn(4), torch.diag(torch.rand(4) + 0.5))
    tiled = Tiling(tile=24, overlap=8)(tokenizer)
    assert isinstance(tiled, CausalTokenizer)
    whole = tiled.encode(video)
    pieces = [video[:, :, :5], video[:, :, 5:9], video[:, :, 9:]]
    latents = list(tiled.encode_pieces(pieces))
    torch.testing.assert_close(torch.cat(latents, dim=2), whole, **CLOSE)
    decoded = torch.cat(list(tiled.decode_pieces(latents)), dim=2)
    torch.testing.assert_close(decoded, tiled.decode(whole), **CLOSE)


def test_a_tiled_tokenizer_is_the_tokenizer_in_all_else() -> None:
    tokenizer = ViViTTokenizer(4, (4, 4, 4), TransformerSize(1, 24, 2))
    tiled = Tiling(tile=24, overlap=8)(tokenizer)
    assert isinstance(tiled, TiledTokenizer)
    assert not isinstance(tiled, CausalTokenizer)
    tiled.set_latent_statistics(torch.randn(4), torch.eye(4))
    assert torch.equal(tokenizer.latent_mean, tiled.latent_mean)
    assert tokenizer.fingerprint() == tiled.fingerprint()
    small = pattern(5, 24, 16)
    assert torch.equal(tiled.encode(small), tokenizer.encode(small))  # one tile
    tiled.decode_raw(tiled.posterior(pattern(5, 40, 24)).mean).sum().backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())


@torch.no_grad()
def test_predict_encodes_by_tiles_where_the_system_is_told_to() -> None:
    tokenizer, video = conv(), pattern(5, 40, 24)
    batch = VideoBatch([""], 8.0, ["0"], video=video)
    tiling = Tiling(tile=24, overlap=8)
    latents = TokenizerSystem(tokenizer, tiling=tiling).predict_step(batch, 0)
    assert torch.equal(latents, tiling(tokenizer).encode(video))
    assert not torch.allclose(latents, TokenizerSystem(tokenizer).predict_step(batch, 0))


def test_sides_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="overlap = 100 of tile = 256: must be positive and at"):
        Tiling(256, 100)
    with pytest.raises(ValueError, match="tile = 50 is not a multiple of the 4 pixels of height"):
        TokenizerSystem(conv(), tiling=Tiling(50, 8))
    sample = ["sample", "--checkpoint", "x.ckpt", "--prompt", "a", "--output", "x.mp4"]
    assert main([*sample, "--tile", "96", "--tiling-overlap", "64"]) == 2
    assert "overlap = 64 of tile = 96: must be positive and at" in capsys.readouterr().err
