"""An image DiT starts a video DiT that predicts the same, frame by frame, and can learn more."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from sora_lightning.denoisers import DiT, DiTParts
from sora_lightning.denoisers.blocks import AdaLNBlock
from sora_lightning.denoisers.conditions import PooledOnly
from sora_lightning.denoisers.from_image import start_from_image_dit
from sora_lightning.layers.partitions import (
    Alternating,
    FactorisedDotProduct,
    FactorisedSelfAttention,
    Joint,
)
from sora_lightning.layers.positions.absolute import Learned, SinusoidalPlane, SinusoidalTime
from sora_lightning.types import Condition

FRAMES = 4
TIME = partial(Learned, grid=(FRAMES, 3, 2))


def dit(layout=None, depth=2, patch=(1, 2, 2), positions=(SinusoidalPlane,), **changes):
    parts = DiTParts(
        block=partial(AdaLNBlock, qk_norm=None),
        condition=PooledOnly,
        positions=positions,
        rotary=None,
    )
    model = DiT(4, 24, 24, depth, 2, patch=patch, layout=layout, parts=parts, **changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def frame_by_frame(image, x, t, condition):
    frames = [image(x[:, :, i : i + 1], t, condition) for i in range(x.shape[2])]
    return torch.cat(frames, dim=2)


@pytest.fixture
def inputs():
    b = 2
    condition = Condition(torch.randn(b, 1, 24), torch.ones(b, 1).bool(), torch.randn(b, 24))
    return torch.randn(b, 4, FRAMES, 6, 4), torch.rand(b), condition


@pytest.mark.parametrize(("layout", "depth"), [(FactorisedSelfAttention(), 2), (Alternating(), 4)])
def test_every_clip_is_seen_frame_by_frame(layout, depth, inputs):
    image = dit()
    video = dit(layout, depth, positions=(SinusoidalPlane, TIME))
    start_from_image_dit(video, image)
    expected = frame_by_frame(image, *inputs)
    torch.testing.assert_close(video(*inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("layout", "depth"), [(FactorisedSelfAttention(), 2), (Alternating(), 4), (Joint(), 2)]
)
@pytest.mark.parametrize("frames", [1, 2])
def test_a_still_clip_is_seen_as_its_image(layout, depth, frames, inputs):
    image = dit()
    video = dit(layout, depth, patch=(frames, 2, 2), positions=(SinusoidalPlane, TIME))
    start_from_image_dit(video, image)
    x, t, condition = inputs
    still = x[:, :, :1].expand_as(x)
    expected = frame_by_frame(image, still, t, condition)
    torch.testing.assert_close(video(still, t, condition), expected, atol=1e-5, rtol=1e-5)


def test_what_goes_through_time_is_not_dead(inputs):
    video = dit(FactorisedSelfAttention(), positions=(SinusoidalPlane, TIME))
    start_from_image_dit(video, dit())
    video(*inputs).square().sum().backward()
    gates = video.blocks[0].modulation.linear.weight.grad.unflatten(0, (3, 3, 24))[1, 2]
    assert gates.abs().max() > 0
    assert video.positions[1].time.grad.abs().max() > 0


def test_what_does_not_fit_is_refused():
    image = dit()
    with pytest.raises(ValueError, match="2 blocks of the image model are too few"):
        start_from_image_dit(dit(Alternating(), 6), image)
    with pytest.raises(ValueError, match="2 blocks of the image model are too many"):
        start_from_image_dit(dit(Alternating(), 2), image)
    with pytest.raises(ValueError, match="SinusoidalTime has no weights to begin at zero"):
        start_from_image_dit(dit(positions=(SinusoidalPlane, SinusoidalTime)), image)
    with pytest.raises(ValueError, match="neither of whole frames nor of one position"):
        start_from_image_dit(dit(FactorisedDotProduct()), image)
    with pytest.raises(ValueError, match=r"final\.out\.weight: shape \(16, 24\)"):
        start_from_image_dit(dit(learned_sigma=True), image)
    with pytest.raises(ValueError, match="patch has one frame"):
        start_from_image_dit(image, dit(patch=(2, 2, 2)))
