"""An image as tokens: of the first frame alone, seen only where it is known, by a CLIP that sees
what its own processor would give it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sora_lightning.conditioning import (
    ClipEmbedding,
    ClipEncoder,
    ConcatConditioning,
    FirstFrames,
    GlobalEncoder,
    ImageEncoder,
    KnownFrames,
    LatentSpace,
)
from sora_lightning.conditioning.images import clip_pixels
from sora_lightning.denoisers import DiT
from sora_lightning.diffusion import Process
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.types import Condition, DenoiserFunction, ImageTokens
from tests.diffusion.gaussian import condition

WIDTH = 8
TOWER = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "patch_size": 8},
    **{"num_hidden_layers": 2, "image_size": 16, "projection_dim": 12},
}
LATENTS = torch.randn(3, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
FIRST = torch.zeros(3, 1, 3, 2, 2, dtype=torch.bool)
FIRST[:2, :, 0] = True


def decode(latents: Tensor) -> Tensor:
    """Stands in for a tokenizer: pixels that depend on the latents of their own frame."""
    return latents[:, :3].repeat_interleave(8, 3).repeat_interleave(8, 4).tanh()


def encoder(kind: str, **arguments: Any) -> ImageEncoder:
    torch.manual_seed(0)
    if kind == "global":
        return GlobalEncoder(4, WIDTH, side=2, **arguments)
    pytest.importorskip("transformers")
    return ClipEncoder(4, WIDTH, **({"config": TOWER} | arguments), side=2)


KINDS = pytest.mark.parametrize("kind", ["global", "clip"])


@KINDS
def test_the_tokens_depend_on_the_first_frame_and_on_nothing_else(kind: str) -> None:
    one = encoder(kind)
    tokens = one.known(LATENTS, FIRST, decode).tokens
    assert tokens.shape == (3, {"global": 4, "clip": 8}[kind], WIDTH)
    later = torch.cat([LATENTS[:, :, :1], torch.randn_like(LATENTS[:, :, 1:])], dim=2)
    assert torch.equal(one.known(later, FIRST, decode).tokens, tokens)
    other = torch.cat([torch.randn_like(LATENTS[:, :, :1]), LATENTS[:, :, 1:]], dim=2)
    changed = (one.known(other, FIRST, decode).tokens - tokens)[:2].abs().amax(2)
    assert (changed > 1e-4).all()  # each token


@KINDS
def test_a_clip_whose_first_frame_is_not_known_whole_has_no_tokens(kind: str) -> None:
    mask = FIRST.clone()
    mask[1, :, 0, 0, 0] = False  # a corner of it is missing
    mask[2, :, 1:] = True  # the others are known
    tokens, there = encoder(kind).known(LATENTS, mask, decode)
    assert there.all(1).tolist() == [True, False, False]
    assert there.any(1).tolist() == [True, False, False]
    assert tokens[0].any()
    assert not tokens[1:].any()


@KINDS
def test_images_of_any_size_and_their_order(kind: str) -> None:
    """An image of another size has as many tokens, and a mirrored one has others."""
    one = encoder(kind)
    for h, w in ((2, 2), (5, 3), (4, 8)):
        latents = torch.randn(1, 4, 1, h, w)
        assert one(latents, decode).shape == one(LATENTS[:1, :, :1], decode).shape
        mirrored = one(latents.flip(4), decode)
        assert (mirrored - one(latents, decode)).abs().max() > 1e-3


def condition_with(tokens: ImageTokens | None) -> Condition:
    plain = condition(3)
    return plain if tokens is None else plain.joined(tokens)


def test_a_network_attends_to_the_tokens_that_are_there_and_to_no_others() -> None:
    torch.manual_seed(0)
    network = DiT(4, 2, size=TransformerSize(1, 24, 2), patch=(1, 1, 1), concat_channels=True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = ImageTokens(torch.randn(3, 5, 2), torch.tensor([[True] * 5, [True] * 5, [False] * 5]))
    x_t, t = torch.randn_like(LATENTS), torch.full((3,), 0.5)
    with_tokens, without = (network(x_t, t, condition_with(one)) for one in (tokens, None))
    assert (with_tokens - without)[:2].flatten(1).abs().amax(1).min() > 1e-3
    torch.testing.assert_close(with_tokens[2], without[2])
    # In a batch that guidance has doubled, each half is conditioned alike.
    space = LatentSpace(Process(), network.patch, decode, decode)
    frames, noise = KnownFrames(LATENTS, FIRST), torch.randn_like(LATENTS)

    def around(encoder: ImageEncoder | None) -> DenoiserFunction:
        make = None if encoder is None else lambda channels, width: encoder
        part = ConcatConditioning([FirstFrames(most=1)], image_encoder=make).build(4, 2, 0.1)
        return part.wrapper(frames, noise, torch.randn_like, space)(network)

    one = GlobalEncoder(4, 2, side=2)
    tokens = one.known(LATENTS, FIRST, decode)
    conditioned, plain = around(one), around(None)
    both = Condition.cat(condition_with(None), condition_with(None))
    twice = conditioned(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    torch.testing.assert_close(twice[:3], conditioned(x_t, t, condition_with(None)))
    torch.testing.assert_close(twice[3:], twice[:3])
    torch.testing.assert_close(
        plain(x_t, t, condition_with(tokens)), conditioned(x_t, t, condition_with(None))
    )


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (50, 33), (97, 64)])
def test_clip_sees_what_its_own_processor_gives(size: tuple[int, int]) -> None:
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (*size, 3), np.uint8)
    levels = np.asarray(Image.fromarray(levels).resize(size[::-1], Image.Resampling.BOX))
    side = {"shortest_edge": 32}
    crop = {"height": 32, "width": 32}
    processor = CLIPImageProcessorPil(size=side, crop_size=crop)
    expected = torch.as_tensor(
        np.asarray(processor(Image.fromarray(levels), return_tensors="np")["pixel_values"])
    )
    pixels = torch.from_numpy(levels.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    difference = (clip_pixels(pixels, 32) - expected).abs()
    assert difference.max() < 2 / 255 / 0.26  # two levels of 255
    assert difference.mean() < 0.25 / 255 / 0.26


def test_clip_is_frozen_and_what_stands_behind_it_trains() -> None:
    one = encoder("clip")
    assert isinstance(one, ClipEncoder)
    one.train()
    one.known(LATENTS, FIRST, decode).tokens.square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in one.tower.parameters())
    assert all(p.grad is not None and p.grad.any() for p in one.project.parameters())
    assert all(p.grad is not None and p.grad.any() for p in one.whole.parameters())


def test_the_tokens_are_those_of_the_towers_embedding() -> None:
    one = encoder("clip")
    assert isinstance(one, ClipEncoder)
    images = clip_pixels(decode(LATENTS[:, :, :1])[:, :, 0], 16)
    embedding = one.tower(pixel_values=images).image_embeds
    expected = one.project(embedding).reshape(3, 4, WIDTH)
    torch.testing.assert_close(one(LATENTS[:, :, :1], decode)[:, :4], expected)


@pytest.mark.parametrize("whole", [False, True], ids=["its vision tower", "a whole CLIP"])
def test_weights_come_from_a_folder_and_go_on_without_it(whole: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    vision = transformers.CLIPVisionConfig(**TOWER)
    if whole:
        text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        config = transformers.CLIPConfig(
            text_config={**text, "num_hidden_layers": 1, "vocab_size": 20},
            vision_config=vision.to_dict(),
            projection_dim=12,
        )
        reference = transformers.CLIPModel(config)
        embed = partial(reference.get_image_features)
    else:
        reference = transformers.CLIPVisionModelWithProjection(vision)
        embed = partial(reference)
    reference.save_pretrained(tmp_path)
    one = encoder("clip", config=None, folder=tmp_path)
    assert isinstance(one, ClipEncoder)
    images = torch.randn(2, 3, 16, 16)
    output = embed(pixel_values=images)
    expected = getattr(output, "image_embeds", getattr(output, "pooler_output", output))
    torch.testing.assert_close(one.tower(pixel_values=images).image_embeds, expected)
    assert one.specification is not None
    again = ClipEncoder(4, WIDTH, **one.specification["init_args"])
    again.load_state_dict(one.state_dict())
    frames = LATENTS[:, :, :1]
    torch.testing.assert_close(again(frames, decode), one(frames, decode))


def test_one_token_is_the_towers_embedding(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    one = ClipEmbedding(4, TOWER["projection_dim"], config=TOWER)
    one.tower.save_pretrained(tmp_path / "image_encoder")
    (tmp_path / "model_index.json").write_text("{}")
    of_pipeline = ClipEmbedding(4, TOWER["projection_dim"], tmp_path)
    images = clip_pixels(decode(LATENTS[:, :, :1])[:, :, 0], 16)
    expected = one.tower(pixel_values=images).image_embeds[:, None]
    torch.testing.assert_close(of_pipeline(LATENTS[:, :, :1], decode), expected)
    assert not any(p.requires_grad for p in one.parameters())
    assert of_pipeline.specification is not None
    again = ClipEmbedding(4, TOWER["projection_dim"], **of_pipeline.specification["init_args"])
    again.load_state_dict(of_pipeline.state_dict())
    torch.testing.assert_close(again(LATENTS[:, :, :1], decode), expected)
    with pytest.raises(ValueError, match="image's embedding has width 12, and the text's 13"):
        ClipEmbedding(4, 13, config=TOWER)


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="folder = None, config = None: give one of them"):
        ClipEncoder(4, WIDTH)
    with pytest.raises(ValueError, match=r"holds no config\.json of a CLIP"):
        ClipEncoder(4, WIDTH, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds a bert; a CLIP is one of clip, clip_vision_model"):
        ClipEncoder(4, WIDTH, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    with pytest.raises(ValueError, match="holds no CLIP to read"):
        ClipEncoder(4, WIDTH, tmp_path)
    with pytest.raises(ValueError, match="side = 0"):
        GlobalEncoder(4, WIDTH, side=0)
