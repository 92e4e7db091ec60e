"""U-ViT: the paper's numbers, skips that reach across, and an image model that starts a video
model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sora_lightning.conditioning import LabelConditioner
from sora_lightning.denoisers.uvit import UVIT_SIZES, LearnedExtent, UViT
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.types import Condition

SMALL = TransformerSize(depth=5, width=24, num_heads=2)


def small_uvit(**changes):
    settings = {"size": SMALL, "extent": LearnedExtent(3, 2, 3, 2)} | changes
    uvit = UViT(4, 16, **settings)
    for parameter in uvit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return uvit.eval()


def text(b, length=3):
    mask = torch.ones(b, length, dtype=torch.bool)
    return Condition(torch.randn(b, length, 16), mask, torch.randn(b, 16))


# Size, latent channels, condition tokens, their width (0: a label's), rows of tokens, patch, final
# convolution; then parameters and billions of multiply-accumulates of the public code.
@pytest.mark.parametrize(
    ("name", "c", "tokens", "text_width", "side", "patch", "smooth", "parameters", "gmac"),
    [
        ("S", 3, 0, 0, 16, 2, True, 44_255_328, 12.20),  # CIFAR-10
        ("S", 4, 77, 768, 16, 2, True, 44_692_644, 16.23),  # MS-COCO
        ("S-deep", 4, 77, 768, 16, 2, True, 58_345_636, 21.24),  # MS-COCO
        ("M", 3, 1000, 0, 16, 4, True, 130_940_292, 35.24),  # ImageNet 64
        ("L", 4, 1001, 0, 16, 2, True, 286_763_172, 76.46),  # ImageNet 256
        ("H", 4, 1001, 0, 16, 2, False, 500_832_016, 133.20),  # ImageNet 256
        ("H", 4, 1001, 0, 16, 4, False, 500_942_656, 133.23),  # ImageNet 512
    ],
)
def test_the_papers_sizes(name, c, tokens, text_width, side, patch, smooth, parameters, gmac):
    size = UVIT_SIZES[name]
    width, classes = text_width or size.width, tokens if tokens > 77 else 0
    length = 1 if classes else tokens
    with torch.device("meta"):
        uvit = UViT(
            c,
            width,
            size,
            patch=(1, patch, patch),
            extent=LearnedExtent(length, 1, side, side),
            project_condition=text_width > 0,
            smooth=smooth,
        )
        modules = [uvit]
        if classes:
            modules.append(
                LabelConditioner(list(map(str, range(classes))), width, null_class=False)
            )
        condition = Condition(
            torch.empty(1, length, width),
            torch.ones(1, length, dtype=torch.bool),
            torch.empty(1, width),
        )
        with FlopCounterMode(display=False) as counter:
            uvit(torch.empty(1, c, 1, side * patch, side * patch), torch.empty(1), condition)
    assert sum(p.numel() for module in modules for p in module.parameters()) == parameters
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=1e-3)


def test_skips_join_each_block_to_its_opposite():
    uvit = small_uvit()
    x, t, condition = torch.randn(1, 4, 2, 6, 4), torch.rand(1), text(1)
    base = uvit(x, t, condition)
    with torch.no_grad():
        for block in [*uvit.down[1:], *uvit.middle]:  # the way through the middle is cut
            for parameter in block.parameters():
                parameter.zero_()
        for block in uvit.up:
            block.skip.weight[:, :24] = 0  # and only what skipped it is kept
    cut = uvit(x, t, condition)
    assert not torch.allclose(cut, base)
    x_2 = x + torch.randn_like(x)
    assert not torch.allclose(uvit(x_2, t, condition), cut)  # the first block still arrives
    with torch.no_grad():
        uvit.up[-1].skip.weight.zero_()
    torch.testing.assert_close(uvit(x_2, t, condition), uvit(x, t, condition))


@pytest.mark.parametrize("skips", [True, False])
def test_without_skips_nothing_passes_by_the_middle(skips):
    uvit = small_uvit(skips=skips)
    uvit.middle[0].register_forward_hook(lambda _block, _inputs, x: torch.zeros_like(x))
    t, condition = torch.rand(1), text(1)
    y_1, y_2 = (uvit(torch.randn(1, 4, 2, 6, 4), t, condition) for _ in range(2))
    assert torch.equal(y_1, y_2) != skips


def test_clips_do_not_see_each_other_and_padding_is_not_seen():
    uvit = small_uvit()
    x, t, condition = torch.randn(3, 4, 2, 6, 4), torch.rand(3), text(3, 2)
    whole = uvit(x, t, condition)
    torch.testing.assert_close(uvit(x, t, condition.pad(3)), whole)
    for i in range(3):
        one = condition[i : i + 1]
        torch.testing.assert_close(uvit(x[i : i + 1], t[i : i + 1], one), whole[i : i + 1])


@pytest.mark.parametrize("extent", [(1, 2, 2), (5, 8, 6)])
def test_any_grid_comes_back_in_its_shape(extent):
    x = torch.randn(2, 4, *extent)
    assert small_uvit()(x, torch.rand(2), text(2)).shape == x.shape


def test_time_and_text_matter_and_the_pooled_vector_does_not():
    uvit = small_uvit()
    x, t, condition, other = torch.randn(2, 4, 1, 6, 4), torch.rand(2), text(2), text(2)
    base = uvit(x, t, condition)
    assert not torch.allclose(uvit(x, t + 0.1, condition), base)
    cond = Condition(other.tokens, condition.mask, condition.pooled)
    assert not torch.allclose(uvit(x, t, cond), base)
    pooled = Condition(condition.tokens, condition.mask, other.pooled)
    assert torch.equal(uvit(x, t, pooled), base)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="depth 4 must be odd"):
        small_uvit(size=TransformerSize(4, 24, 2))
    with pytest.raises(ValueError, match="num_heads = 5: must divide width = 24"):
        small_uvit(size=TransformerSize(5, 24, 5))
    with pytest.raises(ValueError, match="condition width 16 must be 24"):
        small_uvit(project_condition=False)
    with pytest.raises(ValueError, match="must be three positive numbers"):
        small_uvit(patch=(2, 2))
    with pytest.raises(ValueError, match="4 condition tokens, and positions for 3"):
        small_uvit()(torch.zeros(1, 4, 1, 6, 4), torch.rand(1), text(1, 4))
    with pytest.raises(ValueError, match=r"extent\.condition = -1: must not be negative"):
        LearnedExtent(-1)
