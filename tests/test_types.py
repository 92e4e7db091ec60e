import pytest
import torch

from sora_lightning.types import Compression, Condition, TokenGrid, VideoBatch, VideoSize


def test_sizes_read_what_they_print():
    size = VideoSize(17, 32, 48)
    assert VideoSize.parse(str(size)) == size
    for text in ("17x32", "17x32x", "ax32x32", "17*32*32", ""):
        with pytest.raises(ValueError, match="not a video size"):
            VideoSize.parse(text)
    with pytest.raises(ValueError, match="height = 0"):
        VideoSize(1, 0, 8)


def test_compression_maps_sizes_to_grids_and_back():
    compression = Compression(4, 8, 8)
    assert compression.grid(VideoSize(17, 128, 128)) == TokenGrid(5, 16, 16)  # W.A.L.T, FACTS 6
    assert compression.grid(VideoSize(1, 8, 24)) == TokenGrid(1, 1, 3)
    assert compression.size(TokenGrid(5, 16, 16)) == VideoSize(17, 128, 128)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (VideoSize(16, 32, 32), "16 frames do not fit .* of 4.*13 or 17"),
        (VideoSize(17, 30, 32), "height 30 is not a multiple of 8, e.g. 24 or 32"),
        (VideoSize(17, 32, 4), "width 4 is not a multiple of 8, e.g. 8 would"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_their_neighbours(size, message):
    with pytest.raises(ValueError, match=message):
        Compression(4, 8, 8).grid(size)


def test_a_batch_moves_whole_and_is_never_empty():
    batch = VideoBatch(["a"], 8.0, ["0"], video=torch.zeros(1, 3, 1, 2, 2))
    moved = batch.to(torch.float64)
    assert moved.video.dtype == torch.float64
    assert moved.fps == 8.0
    assert moved.captions == ["a"]
    assert len(moved) == 1
    with pytest.raises(ValueError, match="needs video or latents"):
        VideoBatch(["a"], 8.0, ["0"])


def test_joined_conditions_pad_with_masked_tokens():
    short = Condition(torch.ones(1, 2, 4), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 4))
    long = Condition(torch.ones(2, 5, 4), torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 4))
    both = Condition.cat(short, long)
    assert len(both) == 3
    assert both.mask.sum(1).tolist() == [2, 5, 5]
