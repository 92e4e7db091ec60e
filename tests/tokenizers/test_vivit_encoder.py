"""ViViT: the paper's numbers, what each model sees, and an image encoder that starts it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sora_lightning.layers.partitions import FactorisedDotProduct, FactorisedSelfAttention
from sora_lightning.layers.positions.absolute import LearnedPositions
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.tokenizers.vivit_encoder import VIT_SIZES, FactorisedViViT, Tubelets, ViViT
from sora_lightning.types import TokenGrid

SMALL = TransformerSize(depth=2, width=24, num_heads=2)
TUBELETS = Tubelets(2, 4, 4, TokenGrid(3, 2, 2))
MODELS = {
    "1": lambda **size: ViViT(**size),
    "2": lambda **size: FactorisedViViT(**size),
    "2, mean": lambda **size: FactorisedViViT(temporal_depth=0, **size),
    "3": lambda **size: ViViT(layout=FactorisedSelfAttention(), class_token=False, **size),
    "4": lambda **size: ViViT(layout=FactorisedDotProduct(), class_token=False, **size),
}


# Table 2 of arXiv 2103.15691 (Table 3 for the mean, Table 6 for L): millions of parameters with the
# 400 classes of Kinetics, billions of multiply-accumulates on 32 frames of 224 x 224. Its
# parameters are rounded to a tenth; the second number of each is derived from its text.
@pytest.mark.parametrize(
    ("model", "size", "parameters", "gmac"),
    [
        ("1", "B", 88.95, 455.2),
        ("2", "B", 115.06, 284.4),
        ("3", "B", 117.32, 372.3),
        ("4", "B", 88.95, 277.1),
        ("2, mean", "B", 86.70, 283.9),
        ("1", "L", None, 1446),
    ],
)
def test_the_papers_sizes(model, size, parameters, gmac):
    with torch.device("meta"):
        encoder = MODELS[model](size=VIT_SIZES[size])
        head = nn.Linear(encoder.width, 400)
        with FlopCounterMode(display=False) as counter:
            head(encoder(torch.empty(1, 3, 32, 224, 224)).pooled)
    counted = sum(p.numel() for part in (encoder, head) for p in part.parameters()) / 1e6
    if parameters is not None:
        assert counted == pytest.approx(parameters, rel=1e-3)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=1e-2)


def small(model):
    encoder = MODELS[model](size=SMALL, tubelets=TUBELETS)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return encoder


@pytest.mark.parametrize("model", MODELS)
def test_every_model_sees_the_whole_video_and_no_other(model):
    encoder = small(model)
    video = torch.randn(2, 3, 6, 8, 8)
    base = encoder(video)
    assert base.tokens.shape == (2, base.grid.num_tokens, 24)
    changed = video.clone()
    changed[0, :, 5, 7, 7] += 1
    other = encoder(changed)
    moved = (other.tokens - base.tokens).abs().amax(-1) > 1e-7
    assert not moved[1].any()
    if model == "2, mean":  # a frame's vector sees its frame
        assert moved[0].tolist() == [False, False, True]
    else:
        assert moved[0].all()
    assert not torch.allclose(other.pooled[0], base.pooled[0])
    torch.testing.assert_close(other.pooled[1], base.pooled[1])


@pytest.mark.parametrize("model", MODELS)
def test_other_sizes_take_interpolated_positions(model):
    encoded = small(model)(torch.randn(1, 3, 10, 16, 12))
    assert encoded.grid in (TokenGrid(5, 4, 3), TokenGrid(5, 1, 1))


def test_positions_of_the_learned_grid_are_the_table_and_a_constant_stays_one():
    positions = LearnedPositions(2, 3, 4, 8)
    grid = TokenGrid(2, 3, 4)
    assert torch.equal(positions(grid), positions.table.reshape(24, 8))
    nn.init.constant_(positions.table, 0.5)
    torch.testing.assert_close(positions(TokenGrid(5, 2, 9)), torch.full((90, 8), 0.5))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="class_token with FactorisedSelfAttention"):
        ViViT(layout=FactorisedSelfAttention())
    with pytest.raises(ValueError, match="temporal_depth = -1"):
        FactorisedViViT(temporal_depth=-1)
    with pytest.raises(ValueError, match="5 latent positions along f are no multiple of 2"):
        small("1")(torch.zeros(1, 3, 5, 8, 8))
    with pytest.raises(ValueError, match="positions: frames = 0: must be at least 1"):
        LearnedPositions(0, 1, 1, 8)
