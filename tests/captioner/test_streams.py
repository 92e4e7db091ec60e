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


def test_edges_are_the_norm_of_differences_of_neighbours():
    slope = 0.1
    ramp = (slope * torch.arange(12.0)).expand(1, 3, 4, 6, 12)
    rows, columns = EdgeStream([4]).view(ramp)[0, :, :, :-1, :-1]
    torch.testing.assert_close(columns, torch.full_like(columns, 3**0.5 * slope))
    assert rows.abs().max() == 0


def blob(shift, contrast=(0.8, -0.3, 0.5), num_frames=5, side=32):
    """A smooth blob that moves by ``shift`` rows and columns a frame."""
    frame = torch.arange(num_frames) - (num_frames - 1) / 2
    y, x = (torch.arange(side) - side / 2 - s * frame[:, None] for s in shift)
    shape = torch.exp(-(y[:, :, None] ** 2 + x[:, None, :] ** 2) / (2 * 4**2))
    return torch.einsum("c, f h w -> c f h w", torch.tensor(contrast), shape)[None] - 0.2


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.5, 0.0), (-1.0, 0.0), (0.3, -1.2), (1.5, 1.0)])
@pytest.mark.parametrize("contrast", [(0.8, -0.3, 0.5), (0.5, 0.5, 0.0)])
def test_motion_is_the_displacement_in_pixels_whatever_the_contrast(shift, contrast):
    flow = MotionStream([4]).view(blob(shift, contrast))
    assert flow[0, :, 0].abs().max() == 0  # no frame is before the first
    inside = flow[0, :, 1:, 12:20, 12:20]
    for found, right in zip(inside, shift, strict=True):
        assert (found - right).abs().mean() < 0.1 + 0.1 * abs(right)


def test_nothing_moves_where_no_edge_is_and_in_a_single_frame():
    empty = torch.full((1, 3, 4, 16, 16), 0.3)
    assert MotionStream([4]).view(empty).abs().max() == 0
    assert MotionStream([4]).view(blob((1.0, 1.0), num_frames=1)).shape == (1, 2, 1, 32, 32)


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
