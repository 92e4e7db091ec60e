import pytest
import torch
import torch.nn.functional as F

from sora_lightning.layers.causal_conv import CausalConv3d, CausalDownsample, CausalUpsample

LAYERS = {
    "conv": lambda: CausalConv3d(4, 6),
    "down time": lambda: CausalDownsample(4, 8, time=True, space=False),
    "down both": lambda: CausalDownsample(4, 8, time=True, space=True),
    "up time": lambda: CausalUpsample(4, 8, time=True, space=False),
    "up both": lambda: CausalUpsample(8, 4, time=True, space=True),
}
# The last output frame that may depend on input frames 0 .. i, for i = 0, 1, 2, ...
OUTPUTS_BEFORE = {
    "conv": lambda i: i,
    "down time": lambda i: i // 2,
    "down both": lambda i: i // 2,
    "up time": lambda i: 2 * i,
    "up both": lambda i: 2 * i,
}


def channels(layer):
    return layer.conv.in_channels if hasattr(layer, "conv") else layer.in_channels


@pytest.mark.parametrize("name", LAYERS)
def test_no_output_frame_depends_on_later_input_frames(name):
    layer = LAYERS[name]()
    x = torch.randn(2, channels(layer), 9, 4, 6)
    y = layer(x)
    for i in range(8):
        changed = x.clone()
        changed[:, :, i + 1 :] = torch.randn_like(changed[:, :, i + 1 :])
        kept = OUTPUTS_BEFORE[name](i) + 1
        torch.testing.assert_close(layer(changed)[:, :, :kept], y[:, :, :kept])
        assert not torch.allclose(layer(changed)[:, :, kept:], y[:, :, kept:])


@pytest.mark.parametrize("name", LAYERS)
def test_an_image_is_the_first_frame_of_a_video(name):
    layer = LAYERS[name]()
    x = torch.randn(2, channels(layer), 5, 4, 6)
    torch.testing.assert_close(layer(x[:, :, :1]), layer(x)[:, :, :1])


def test_frames_halve_to_one_more_than_half_and_double_back():
    x = torch.randn(1, 4, 9, 4, 6)
    down = CausalDownsample(4, 8, time=True, space=True)(x)
    assert down.shape == (1, 8, 5, 2, 3)
    assert CausalUpsample(8, 4, time=True, space=True)(down).shape == x.shape


def test_shortcuts_alone_carry_a_still_flat_video_through():
    down = CausalDownsample(3, 12, time=True, space=True)
    up = CausalUpsample(12, 3, time=True, space=True)
    for layer in (down, up):
        torch.nn.init.zeros_(layer.conv.weight)
        torch.nn.init.zeros_(layer.conv.bias)
    flat = torch.full((1, 3, 5, 4, 4), 0.7)
    torch.testing.assert_close(up(down(flat)), flat)


def test_channels_that_do_not_fold_are_refused():
    with pytest.raises(
        ValueError, match=r"folds them into 32, which is no multiple of the next level's 5"
    ):
        CausalDownsample(4, 5, time=True, space=True)
    with pytest.raises(ValueError, match="no multiple of the level's 7"):
        CausalUpsample(7, 4, time=True, space=True)
    with pytest.raises(ValueError, match="must be odd"):
        CausalConv3d(3, 3, (3, 2, 3))


@pytest.mark.parametrize("kernel", [(3, 1, 1), (4, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_kernel_through_time_alone_convolves_as_the_3d_convolution_does(kernel, stride):
    layer = CausalConv3d(4, 6, kernel, (stride, 1, 1))
    x = torch.randn(2, 4, 9, 3, 5).contiguous(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    padded = F.pad(x, (0, 0, 0, 0, kernel[0] - 1, 0), mode="replicate")
    expected = F.conv3d(padded, layer.weight, layer.bias, layer.stride)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    inputs = (x, layer.weight, layer.bias)
    gradients = (torch.autograd.grad(z.square().sum(), inputs) for z in (y, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
