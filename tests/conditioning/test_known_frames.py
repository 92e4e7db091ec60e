"""Known frames as channels: what is known comes through, nothing else shows."""

from __future__ import annotations

import pytest
import torch

from sora_lightning.conditioning import (
    ConcatConditioning,
    FirstFrameAndPosition,
    FirstFrames,
    MaskedLatents,
)
from sora_lightning.denoisers import DiT
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.types import Condition, PackedLatents
from tests.diffusion.gaussian import condition

LATENTS = torch.randn(3, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
FIRST = torch.zeros(3, 1, 3, 2, 2, dtype=torch.bool)
FIRST[:2, :, 0] = True


@pytest.mark.parametrize("channels", [MaskedLatents(), FirstFrameAndPosition()], ids=str)
def test_nothing_unknown_shows_and_what_is_known_comes_through(channels):
    given = channels(LATENTS, FIRST)
    assert given.shape == (3, 5, 3, 2, 2)
    elsewhere = torch.where(FIRST, LATENTS, torch.randn_like(LATENTS))
    assert torch.equal(channels(elsewhere, FIRST), given)
    assert torch.equal(given[:2, :4, 0], LATENTS[:2, :, 0])
    assert not given[2].any()  # nothing is known of the third clip
    assert (given[:2, 4, 0] == 1).all()


def test_masked_latents_take_any_mask_and_show_it():
    mask = torch.rand(3, 1, 3, 2, 2) < 0.5
    given = MaskedLatents()(LATENTS, mask)
    assert torch.equal(given[:, :4], LATENTS * mask)
    assert torch.equal(given[:, 4:], mask.float())


def test_later_frames_hold_their_place():
    given = FirstFrameAndPosition()(LATENTS, FIRST)
    assert (given[:2, :4, 1] == 0.5).all()
    assert (given[:2, :4, 2] == 1).all()
    last = FIRST.flip(2)
    with pytest.raises(ValueError, match="first latent frame alone"):
        FirstFrameAndPosition()(LATENTS, last)


def test_text_and_frames_are_dropped_apart_and_together():
    def part(drop_text: float, **shares: float) -> ConcatConditioning:
        return ConcatConditioning([FirstFrames()], **shares).build(4, 8, drop_text)

    uniforms = (torch.arange(1000) + 0.5) / 1000
    no_text = uniforms < 0.4
    no_frames = part(0.4, drop_frames=0.2, drop_both=0.3).without_frames(uniforms)
    assert (no_text & ~no_frames).sum() == 100
    assert (no_frames & ~no_text).sum() == 200
    assert (no_text & no_frames).sum() == 300
    with pytest.raises(ValueError, match="less than 1 together"):
        part(0.5, drop_frames=0.5)
    with pytest.raises(ValueError, match=r"must be at least drop_both = 0\.2"):
        part(0.1, drop_both=0.2)
    with pytest.raises(ValueError, match="must not be negative"):
        part(0.1, drop_frames=-0.1)
    with pytest.raises(ValueError, match="nothing would ever be known"):
        ConcatConditioning([])


def dit(**arguments) -> DiT:
    torch.manual_seed(0)
    network = DiT(4, 2, size=TransformerSize(1, 24, 2), patch=(1, 1, 1), **arguments)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def condition_with(given: torch.Tensor | None) -> Condition:
    plain = condition(3)
    return Condition(plain.tokens, plain.mask, plain.pooled, given)


def test_a_network_sees_the_channels_and_takes_none_for_zeros():
    network, t = dit(concat_channels=True), torch.full((3,), 0.5)
    given = MaskedLatents()(LATENTS, FIRST)
    x_t = torch.randn_like(LATENTS)
    seen, without = (network(x_t, t, condition_with(one)) for one in (given, None))
    assert seen.shape == LATENTS.shape
    assert (seen[:2] - without[:2]).abs().max() > 1e-3
    torch.testing.assert_close(seen[2], without[2])
    zeros = torch.zeros_like(given)
    torch.testing.assert_close(network(x_t, t, condition_with(zeros)), without)
    with pytest.raises(ValueError, match="for a network with concat_channels"):
        dit()(x_t, t, condition_with(given))
    packed = PackedLatents(tuple(x_t))
    alone = network(packed, t, condition_with(None))
    torch.testing.assert_close(torch.stack(alone.clips), without)
    with pytest.raises(ValueError, match="cannot be packed"):
        network(packed, t, condition_with(given))


def test_conditions_with_and_without_channels_stand_in_one_batch():
    given = MaskedLatents()(LATENTS, FIRST)
    both = Condition.cat(condition_with(given), condition_with(None))
    assert both.concat_latents is not None
    assert torch.equal(both.concat_latents[:3], given)
    assert not both.concat_latents[3:].any()
    assert torch.equal(both[1:2].concat_latents, given[1:2])
    assert Condition.cat(condition_with(None), condition_with(None)).concat_latents is None
    assert torch.equal(condition_with(given).pad(5).concat_latents, given)
