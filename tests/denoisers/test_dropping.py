"""Dropped tokens are as if they were not there (NaViT, arXiv 2307.06304, section 2.2)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sora_lightning.denoisers import DiT, UViT
from sora_lightning.denoisers.base import clip_by_clip
from sora_lightning.denoisers.conditioning_variants import CrossAttentionDiT, InContextDiT
from sora_lightning.denoisers.dit import DiTParts
from sora_lightning.diffusion import SquaredError
from sora_lightning.diffusion.known import Known
from sora_lightning.layers.positions.absolute import Fractional
from sora_lightning.types import PackedLatents
from tests.denoisers.test_packed import EXTENTS, LAYOUTS, pack, trained_dit

NETWORKS = [
    {},
    {"network": InContextDiT},
    {"network": CrossAttentionDiT},
    {"parts": DiTParts(positions=(Fractional,))},
]


def masks(dit: DiT, share: float = 0.5, extents=EXTENTS) -> tuple[torch.Tensor, ...]:
    """Latents of a share of the tokens of each clip, one of them at least."""
    shown = []
    for extent in extents:
        grid = dit.patch.grid(*extent)
        tokens = torch.rand(grid.num_tokens) < share
        tokens[int(torch.randint(grid.num_tokens, ()))] = True
        spread = tokens[None, :, None].float().expand(-1, -1, dit.patch.volume)
        shown.append(dit.patch.unpatchify(spread, grid)[0, 0] > 0)
    return tuple(shown)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
def test_what_is_dropped_is_not_seen_and_nothing_else_changes(layout) -> None:
    dit = trained_dit(layout)
    x_t, t, cond = pack()
    shown = masks(dit)
    other = x_t.map(lambda x, s: torch.where(s, x, torch.randn_like(x)), shown)
    whole = dit(x_t, t, cond).clips
    one, two = (dit(replace(x, shown=shown), t, cond).clips for x in (x_t, other))
    for a, b, full, mask in zip(one, two, whole, shown, strict=True):
        assert torch.equal(a, b)
        assert not a[:, ~mask].any()
        assert a[:, mask].any()
        assert mask.all() or not torch.allclose(a[:, mask], full[:, mask], atol=1e-3)
    every = tuple(torch.ones_like(mask) for mask in shown)
    for a, b in zip(dit(replace(x_t, shown=every), t, cond).clips, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
def test_a_video_of_which_the_first_frame_is_kept_is_that_image(layout) -> None:
    dit = trained_dit(layout)
    x_t, t, cond = pack()
    shown = tuple(torch.zeros(extent, dtype=torch.bool) for extent in EXTENTS)
    for mask in shown:
        mask[0] = True
    kept = dit(replace(x_t, shown=shown), t, cond).clips
    images = dit(x_t.map(lambda x: x[:, :1]), t, cond).clips
    for a, b in zip(kept, images, strict=True):
        torch.testing.assert_close(a[:, :1], b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", NETWORKS, ids=["plain", "in-context", "cross", "fractional"])
def test_clips_with_dropped_tokens_are_packed_as_they_stand_alone(options: dict) -> None:
    dit = trained_dit(**options)
    x_t, t, cond = pack()
    shown = masks(dit)
    together = dit(replace(x_t, shown=shown), t, cond).clips
    for i, (clip, mask) in enumerate(zip(x_t.clips, shown, strict=True)):
        alone = PackedLatents((clip,), (mask,))
        (output,) = dit(alone, t[i : i + 1], cond[i : i + 1]).clips
        torch.testing.assert_close(together[i], output, atol=1e-5, rtol=0)


def test_the_loss_asks_for_what_is_shown_and_unknown_alone() -> None:
    dit = trained_dit()
    x_0, t, cond = pack()
    noise = x_0.map(torch.randn_like)
    shown = masks(dit)
    dropped = replace(x_0, shown=shown)
    first = [torch.zeros(1, 1, *extent, dtype=torch.bool) for extent in EXTENTS]
    for mask in first:
        mask[:, :, 0] = True
    known = [Known.of(mask, dit.patch) for mask in first]
    objective = SquaredError()
    for given in (None, known):
        losses = objective(dit, dropped, noise, t, cond, given)
        clips = zip(x_0.clips, noise.clips, shown, first, strict=True)
        for i, (x, e, mask, image) in enumerate(clips):
            x_t = torch.lerp(x, e, t[i])
            times, asked = torch.full(mask.shape, float(t[i])), mask
            if given is not None:
                x_t, times = torch.where(image[0], x, x_t), torch.where(image[0, 0], 0.0, times)
                asked = mask & ~image[0, 0]
            of_tokens = dit.patch.patchify(times[None, None])[0, :, 0]
            alone = PackedLatents((x_t,), (mask,))
            (output,) = dit(alone, of_tokens, cond[i : i + 1]).clips
            error = (output - (e - x)).square()[:, asked]
            expected = error.mean() if asked.any() else torch.zeros(())
            torch.testing.assert_close(losses[i], expected, atol=1e-5, rtol=1e-5)


def test_networks_that_need_every_token_refuse() -> None:
    x_t, t, cond = pack([(3, 4, 4)])
    shown = (torch.ones(3, 4, 4, dtype=torch.bool),)
    assert DiT.drops_tokens
    assert not UViT.drops_tokens
    with pytest.raises(ValueError, match="DiT cannot do without some of a clip's tokens"):
        clip_by_clip(trained_dit(), replace(x_t, shown=shown), t, cond)
    with pytest.raises(ValueError, match="2 masks of what is shown for 1 clips"):
        replace(x_t, shown=shown * 2)
