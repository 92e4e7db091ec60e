import pytest
import torch

from sora_lightning.captioner import EdgeStream, MotionStream, VideoEncoder
from sora_lightning.layers.patch import Patch
from sora_lightning.layers.transformer import TransformerSize

STREAMS = (EdgeStream, MotionStream)


@pytest.mark.parametrize("kind", STREAMS)
def test_other_colours_of_equal_contrast_look_the_same(kind):
    video = torch.rand(2, 3, 4, 8, 8) * 2 - 1
    turned, _ = torch.linalg.qr(torch.randn(3, 3))
    recoloured = torch.einsum("c e, b e f h w -> b c f h w", turned, video) + 0.3
    stream = kind([4])
    torch.testing.assert_close(stream.view(recoloured), stream.view(video))
    other = stream.view(video.flip(0))
    assert not torch.allclose(other, stream.view(video))


def test_edges_are_differences_of_neighbours_and_motion_their_flow():
    slope = 0.1
    places = slope * torch.arange(12.0)
    ramp = (places[None, :] - places[:4, None])[None, None, :, None]  # moves right, b 1 F 1 W
    ramp = ramp.expand(1, 3, 4, 6, 12)
    inside = (0, slice(None), slice(1, None), slice(None, -1), slice(None, -1))
    rows, columns = EdgeStream([4]).view(ramp)[inside]
    torch.testing.assert_close(columns, torch.full_like(columns, 3**0.5 * slope))
    assert rows.abs().max() == 0
    down, right = MotionStream([4]).view(ramp)[inside]
    flow = -3 * slope**2 / (6 * slope**2 + 1e-2) ** 0.5
    torch.testing.assert_close(right, torch.full_like(right, flow))
    assert down.abs().max() == 0
    assert (MotionStream([4]).view(ramp.flip(2))[inside][1] > 0).all()  # moves left


def test_a_token_holds_the_features_of_its_tubelet():
    stream, patch = EdgeStream([4, 6]), Patch(2, 8, 4)
    video = torch.zeros(1, 3, 4, 16, 12)
    changed = video.clone()
    changed[:, :, 2, 11, 9] = 1  # of the second tubelet along time, the second row, third column
    tokens = stream(changed, patch) - stream(video, patch)
    grid = tokens.abs().sum(-1).reshape(2, 2, 3)
    assert grid[0].max() == 0
    assert grid[1].argmax() == 5


def test_a_tubelet_that_the_stride_does_not_divide_is_refused():
    with pytest.raises(
        ValueError, match=r"tubelet = \[2, 8, 4\]: .* multiples of 8, the stride of E"
    ):
        VideoEncoder(TransformerSize(1, 16, 2), (2, 8, 4), streams=[EdgeStream()])
    with pytest.raises(ValueError, match="channels = "):
        MotionStream([])
