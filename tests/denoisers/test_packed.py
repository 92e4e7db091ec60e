"""Clips packed into one sequence give what each gives alone, for every layout."""

import pytest
import torch

from sora_lightning.denoisers import DiT
from sora_lightning.denoisers.base import clip_by_clip
from sora_lightning.layers.partitions import (
    Alternating,
    FactorisedDotProduct,
    FactorisedEncoder,
    FactorisedSelfAttention,
    Joint,
    Skiparse,
    Windows,
)
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.types import Condition, PackedLatents

LAYOUTS = [
    Joint(),
    FactorisedEncoder(2),
    FactorisedSelfAttention(),
    FactorisedDotProduct(),
    Alternating(),
    Windows([[1, None, None], [2, 2, 3]]),
    Skiparse(ratio=2, num_joint=1),
]
EXTENTS = [(3, 4, 4), (1, 2, 6), (5, 6, 2), (3, 4, 4), (1, 8, 6), (2, 2, 2)]


def trained_dit(layout=None, depth=4, network=DiT, **options):
    dit = network(
        4, 16, size=TransformerSize(depth, 24, 2), patch=(1, 2, 2), layout=layout, **options
    )
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return dit


def pack(extents=EXTENTS):
    """Latents, times of their own, texts of their own and of several lengths."""
    b = len(extents)
    x_t = PackedLatents(tuple(torch.randn(4, *extent, requires_grad=True) for extent in extents))
    mask = torch.arange(5) < torch.randint(1, 6, (b, 1))
    return x_t, torch.rand(b), Condition(torch.randn(b, 5, 16), mask, torch.randn(b, 16))


def gradients(outputs, inputs):
    """Gradients along a fixed direction, to compare two ways of computing the same outputs."""
    draw = torch.Generator().manual_seed(1)
    total = sum((y * torch.randn(y.shape, generator=draw)).sum() for y in outputs)
    return torch.autograd.grad(total, inputs)


def assert_equal_outputs_and_gradients(dit, x_t, t, condition):
    inputs = [*x_t.clips, *dit.parameters()]
    packed = dit(x_t, t, condition)
    separate = clip_by_clip(dit, x_t, t, condition)
    given, wanted = gradients(packed.clips, inputs), gradients(separate.clips, inputs)
    for one, other in zip(packed.clips, separate.clips, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    for one, other in zip(given, wanted, strict=True):
        scale = max(1.0, float(other.abs().max()))  # a parameter's gradient sums over all tokens
        torch.testing.assert_close(one / scale, other / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
def test_packed_equals_separate(layout):
    assert_equal_outputs_and_gradients(trained_dit(layout), *pack())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
def test_packed_equals_separate_with_known_frames(layout):
    dit = trained_dit(layout)
    x_t, t, condition = pack()
    times = [time.repeat(n) for time, n in zip(t, dit.num_tokens(x_t), strict=True)]
    for time, clip in zip(times, x_t.clips, strict=True):
        time[: clip.shape[2] * clip.shape[3] // 4] = 0  # the first frame is known
    assert_equal_outputs_and_gradients(dit, x_t, torch.cat(times), condition)


def test_packs_of_one_clip_and_of_one_size():
    assert_equal_outputs_and_gradients(trained_dit(), *pack([(3, 4, 4)]))
    assert_equal_outputs_and_gradients(trained_dit(), *pack([(3, 4, 4)] * 3))


def test_a_clip_has_its_own_time_in_a_pack():
    dit = trained_dit()
    x_t, t, condition = pack()
    base = dit(x_t, t, condition).clips
    later = t.clone()
    later[2] += 0.3
    moved = dit(x_t, later, condition).clips
    for i, (one, other) in enumerate(zip(base, moved, strict=True)):
        assert torch.allclose(one, other, atol=1e-6) == (i != 2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
def test_time_may_be_given_for_each_token(layout):
    dit = trained_dit(layout)
    x, t = torch.randn(2, 4, 3, 4, 4), torch.rand(2)
    condition = pack([(3, 4, 4)] * 2)[2]
    per_clip = dit(x, t, condition)
    torch.testing.assert_close(dit(x, t[:, None].repeat(1, 12), condition), per_clip)
    known = t[:, None].repeat(1, 12)
    known[:, :4] = 0
    assert not torch.allclose(dit(x, known, condition), per_clip)


def test_a_number_of_times_that_fits_nothing_is_refused():
    dit = trained_dit()
    x_t, _, condition = pack()
    with pytest.raises(ValueError, match="one for each of the 56 tokens"):
        dit(x_t, torch.rand(7), condition)
    with pytest.raises(ValueError, match="one for each of the 12 tokens"):
        dit(torch.randn(2, 4, 3, 4, 4), torch.rand(2, 3), condition[:2])


def test_latents_that_do_not_share_channels_are_refused():
    with pytest.raises(ValueError, match="cannot be packed"):
        PackedLatents((torch.zeros(4, 1, 2, 2), torch.zeros(3, 1, 2, 2)))
    with pytest.raises(ValueError, match="one clip at least"):
        PackedLatents(())
