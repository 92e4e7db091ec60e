"""The structure tensor of pixels, and a video encoder that sees it beside them."""

import pytest
import torch

from sora_lightning.captioner import StructureTensorStem, VideoEncoder
from sora_lightning.captioner.video_encoder import structure_tensor
from sora_lightning.layers.transformer import TransformerSize
from tests.captioner.networks import clips


def test_the_structure_tensor_of_a_moving_ramp_has_its_slope_and_speed():
    slope, speed = 0.3, 2.0
    frames, columns = torch.arange(4.0)[:, None, None], torch.arange(6.0)
    ramp = (slope * (columns - speed * frames)).expand(4, 5, 6)
    video = torch.stack([ramp, torch.zeros_like(ramp), torch.ones_like(ramp)])
    t, x = -speed * slope, slope
    expected = torch.tensor([t * t, 0, x * x, 0, t * x, 0]) / (t * t + x * x + 1e-2) ** 0.5
    inner = structure_tensor(video[None])[0, :, 1:, :-1, :-1]
    torch.testing.assert_close(inner, expected[:, None, None, None].expand_as(inner))


def test_it_is_equal_for_exchanged_and_for_inverted_colours():
    (video,) = clips((5, 8, 8))
    seen = structure_tensor(video[None])
    torch.testing.assert_close(structure_tensor(video[None, [2, 0, 1]]), seen)
    torch.testing.assert_close(structure_tensor(-video[None]), seen)


def test_clips_of_several_sizes_are_encoded_with_a_stem_as_each_alone():
    torch.manual_seed(0)
    stem = StructureTensorStem([4, 6])
    encoder = VideoEncoder(TransformerSize(1, 16, 2), (2, 8, 8), stem=stem).eval()
    videos = clips((5, 16, 16), (3, 24, 16), (1, 16, 8))
    tokens, _ = encoder(videos)
    alone = torch.cat([encoder(video[None])[0] for video in videos], dim=1)
    torch.testing.assert_close(tokens, alone, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        encoder.stem_in.weight.zero_()
    assert not torch.allclose(encoder(videos)[0], tokens)


def test_a_stem_that_does_not_fit_the_tubelet_is_refused():
    with pytest.raises(ValueError, match=r"tubelet = \[2, 4, 8\]: .* multiples of 8, the stride"):
        VideoEncoder(tubelet=(2, 4, 8), stem=StructureTensorStem())
    with pytest.raises(ValueError, match=r"channels = \[\]: must name"):
        StructureTensorStem([])
