"""The transformer tokenizer: any layout, any sizes, several clips in one sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sora_lightning.layers.partitions import (
    Alternating,
    AttentionLayout,
    FactorisedDotProduct,
    FactorisedEncoder,
    FactorisedSelfAttention,
    Joint,
    Skiparse,
    Windows,
)
from sora_lightning.layers.positions.absolute import Fractional, Sinusoidal
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.tokenizers import CausalTokenizer, ViViTTokenizer
from sora_lightning.tokenizers.vivit import Positions
from sora_lightning.types import Compression, PackedLatents

LAYOUTS = [
    Joint(),
    FactorisedSelfAttention(),
    FactorisedDotProduct(),
    Alternating(),
    FactorisedEncoder(1),
    Windows([[1, 2, 2], [2, 3, 3]]),
    Skiparse(2, num_joint=1),
]
SIZES = [(5, 16, 24), (1, 8, 8), (9, 8, 16), (5, 16, 24), (1, 24, 16)]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def tokenizer_of(layout: AttentionLayout | None = None, **options: object) -> ViViTTokenizer:
    tokenizer = ViViTTokenizer(
        4,
        (4, 8, 8),
        TransformerSize(3, 24, 2, mlp_ratio=2.0),
        TransformerSize(4, 36, 2, mlp_ratio=2.0),
        layout,
        **options,
    )
    return tokenizer.eval()


def clips(sizes: list[tuple[int, int, int]] = SIZES) -> list[Tensor]:
    return [torch.rand(3, *size) * 2 - 1 for size in sizes]


def test_geometry_and_an_image_of_one_frame() -> None:
    tokenizer = tokenizer_of()
    assert tokenizer.compression == Compression(4, 8, 8)
    latents = tokenizer.encode(torch.randn(2, 3, 9, 16, 24))
    assert latents.shape == (2, 4, 3, 2, 3)
    assert tokenizer.decode(latents).shape == (2, 3, 9, 16, 24)
    image = tokenizer.encode(torch.randn(2, 3, 1, 40, 8))
    assert image.shape == (2, 4, 1, 5, 1)
    assert tokenizer.decode(image).shape == (2, 3, 1, 40, 8)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda one: type(one).__name__)
def test_a_pack_gives_each_clip_what_it_gives_alone(layout: AttentionLayout) -> None:
    """Posterior, pixels, and the gradients of all weights."""
    tokenizer, videos = tokenizer_of(layout), clips()
    tokenizer.set_latent_statistics(torch.randn(4), torch.diag(torch.rand(4) + 0.5))
    posteriors = tokenizer.posterior_packed(videos)
    packed = tokenizer.decode_packed(PackedLatents(tuple(p.mean[0] for p in posteriors)))
    sum(video.square().sum() for video in packed).backward()
    together = {
        name: p.grad.clone() for name, p in tokenizer.named_parameters() if p.grad is not None
    }
    tokenizer.zero_grad()
    encoded = tokenizer.encode_packed(videos).clips
    for video, posterior, pixels, latents in zip(videos, posteriors, packed, encoded, strict=True):
        alone = tokenizer.posterior(video[None])
        torch.testing.assert_close(posterior.mean, alone.mean, **CLOSE)
        torch.testing.assert_close(posterior.log_variance, alone.log_variance, **CLOSE)
        decoded = tokenizer.decode_raw(alone.mean)
        torch.testing.assert_close(pixels, decoded[0], **CLOSE)
        torch.testing.assert_close(latents, tokenizer.encode(video[None])[0], **CLOSE)
        decoded.square().sum().backward()
    assert together["pixels_in.weight"].abs().max() > 1
    for name, parameter in tokenizer.named_parameters():
        if name in together:
            scale = together[name].abs().max()
            torch.testing.assert_close(parameter.grad / scale, together[name] / scale, **CLOSE)
        else:
            assert parameter.grad is None


def test_layouts_differ_and_factorised_frames_meet_through_time_alone() -> None:
    """In factorised attention's first block, a change at one place reaches other frames at that
    place; a depth of one shows it.
    """
    size = TransformerSize(1, 24, 2)
    video = torch.rand(1, 3, 5, 16, 16)
    changed = video.clone()
    changed[:, :, 1:, :8, :8] += 1.0  # the second latent frame, first row and column
    moved = {}
    for name, layout in (("joint", Joint()), ("by turns", Alternating())):
        tokenizer = ViViTTokenizer(4, (4, 8, 8), size, layout=layout).eval()
        difference = tokenizer.encode(changed) - tokenizer.encode(video)
        moved[name] = difference.abs().amax(dim=(0, 1)) > 1e-6  # f h w
    assert moved["joint"].all()
    expected = torch.zeros(2, 2, 2, dtype=torch.bool)
    expected[1] = True  # one block that attends within frames
    assert torch.equal(moved["by turns"], expected)


def test_it_is_not_causal_and_does_not_claim_to_be() -> None:
    tokenizer = tokenizer_of(FactorisedSelfAttention())
    assert not isinstance(tokenizer, CausalTokenizer)
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    image = tokenizer.encode(video[:, :, :1])
    assert not torch.allclose(tokenizer.encode(video)[:, :, :1], image, atol=1e-3)


def test_positions_are_those_of_any_size_and_can_be_exchanged() -> None:
    """Without positions a transformer cannot tell tubelets apart; with them it can."""
    still = torch.rand(1, 3, 1, 8, 8).repeat(1, 1, 5, 4, 4)  # every tubelet the same
    none = tokenizer_of(positions=Positions(added=(), rotary=None))
    latents = none.encode(still)
    torch.testing.assert_close(latents, latents[:, :, :1, :1, :1].expand_as(latents), **CLOSE)
    for added in (Sinusoidal, Fractional):
        tokenizer = tokenizer_of(positions=Positions(added=(added,), rotary=None))
        assert tokenizer.encode(still).std(dim=(2, 3, 4)).min() > 1e-4
    large = tokenizer_of().encode(torch.rand(1, 3, 33, 64, 8))
    assert large.shape == (1, 4, 9, 8, 1)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tubelet = \[4, 8\] must be three positive numbers"):
        ViViTTokenizer(tubelet=(4, 8))
    late = Positions(added=(lambda width: Sinusoidal(width, before_block=3),))
    with pytest.raises(ValueError, match="before_block = 3 of Sinusoidal: must be at most 2"):
        tokenizer_of(positions=late)
    with pytest.raises(ValueError, match="5x16x20: width 20 is not a multiple of 8"):
        tokenizer_of().encode(torch.zeros(1, 3, 5, 16, 20))
    with pytest.raises(ValueError, match="4x16x16: 4 frames do not fit"):
        tokenizer_of().encode_packed([torch.zeros(3, 1, 8, 8), torch.zeros(3, 4, 16, 16)])
