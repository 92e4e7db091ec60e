"""Alignment with a video encoder (REPA): its gradient, its targets, packs, checkpoints."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sora_lightning.captioner import VideoEncoder
from sora_lightning.conditioning import TextConditioner
from sora_lightning.denoisers import DiT, UViT
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems import DiffusionSystem
from sora_lightning.systems.alignment import RepresentationAlignment
from sora_lightning.systems.batches import batch_pixels
from sora_lightning.systems.draws import GroupDraws
from sora_lightning.tokenizers import ConvTokenizer
from sora_lightning.types import PackedBatch, TokenGrid


def _encoder() -> VideoEncoder:
    return VideoEncoder(TransformerSize(1, 24, 2), tubelet=(2, 8, 8))


def _system(alignment: RepresentationAlignment | None, **denoiser: Any) -> DiffusionSystem:
    tokenizer = ConvTokenizer(4, [8, 16], [True], [True], patch=4, blocks_per_level=1)
    size = TransformerSize(2, 24, 2)
    system = DiffusionSystem(
        tokenizer,
        TextConditioner(width=16, depth=1, num_heads=2),
        lambda channels, width: DiT(channels, width, size, patch=(1, 1, 1), **denoiser),
        alignment=alignment,
    )
    for parameter in system.denoiser.parameters():  # zero gates would hide half of the gradients
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return system


def _batch(*sizes: tuple[int, int, int]) -> PackedBatch:
    rng = torch.Generator().manual_seed(0)
    videos = [torch.rand(3, *size, generator=rng) * 2 - 1 for size in sizes]
    names = [f"{i:016x}" for i in range(len(sizes))]
    captions = [f"clip {name}" for name in names]
    return PackedBatch(captions, 8.0, names, [0] * len(sizes), 0.5, videos=videos)


def _losses(system: DiffusionSystem, batch: PackedBatch) -> Tensor:
    return system.losses(batch, GroupDraws.of_clips(batch, 0, torch.device("cpu")))


def _denoiser_gradients(weight: float | None, **denoiser: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = None if weight is None else RepresentationAlignment(_encoder(), 1, weight)
    torch.manual_seed(1)
    system = _system(made, **denoiser)
    _losses(system, _batch((5, 16, 16), (3, 16, 24))).sum().backward()
    named = system.denoiser.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


def test_the_weight_scales_the_gradient_of_the_denoiser_alone() -> None:
    """At 0 the denoiser trains as without alignment, and each weight adds as much."""
    without, none, half, one = (_denoiser_gradients(weight) for weight in (None, 0.0, 0.5, 1.0))
    name = "blocks.0.attentions.0.qkv.weight"
    assert (one[name] - none[name]).norm() > 1e-3 * none[name].norm()
    for name, gradient in none.items():
        torch.testing.assert_close(gradient, without[name])
        torch.testing.assert_close(2 * half[name] - gradient, one[name], atol=1e-5, rtol=1e-4)
    later = "blocks.1.attentions.0.qkv.weight"  # behind the block whose tokens are aligned
    torch.testing.assert_close(one[later], without[later])


def test_the_projector_learns_whatever_the_weight() -> None:
    system = _system(RepresentationAlignment(_encoder(), 1, weight=0.0, hidden_width=32))
    assert system.alignment is not None
    _losses(system, _batch((5, 16, 16))).sum().backward()
    assert all(p.grad.norm() > 0 for p in system.alignment.projector.parameters())
    assert all(p.grad is None for p in system.alignment.encoder.parameters())


def test_activation_checkpointing_changes_no_gradient() -> None:
    found, expected = (
        _denoiser_gradients(1.0, activation_checkpointing=True),
        _denoiser_gradients(1.0),
    )
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_packed_clips_have_the_losses_of_each_alone() -> None:
    torch.manual_seed(0)
    system = _system(RepresentationAlignment(_encoder(), 2))
    batch = _batch((5, 16, 16), (3, 16, 24), (1, 8, 8))
    kept = [torch.arange(0, 12, 2), torch.arange(12), torch.arange(1)]
    for packed in (batch, replace(batch, kept=kept)):
        together = _losses(system, packed)
        assert packed.videos is not None
        for i in range(len(batch)):
            one = PackedBatch(
                packed.captions[i : i + 1],
                packed.fps,
                packed.clip_ids[i : i + 1],
                packed.repeats[i : i + 1],
                packed.fill,
                videos=packed.videos[i : i + 1],
                kept=None if packed.kept is None else packed.kept[i : i + 1],
            )
            torch.testing.assert_close(_losses(system, one)[0], together[i], atol=1e-5, rtol=1e-5)


def test_tokens_that_are_the_features_have_the_loss_minus_one() -> None:
    alignment = RepresentationAlignment(_encoder(), 1)
    alignment.projector = nn.Identity()
    pixels, grid = torch.rand(2, 3, 5, 16, 24), TokenGrid(3, 2, 3)
    tokens, _ = alignment.encoder.eval()(pixels)
    torch.testing.assert_close(alignment.features(pixels, grid), tokens)
    loss = alignment((3 * tokens, PackedSequence([grid])), [pixels])
    torch.testing.assert_close(loss, -torch.ones(2))


def test_features_stand_where_the_tokens_do() -> None:
    """An encoder whose features are the coordinates of its tubelets gives those of the tokens."""

    class Coordinates(VideoEncoder):
        def forward(self, videos: Any, kept: Any = None) -> tuple[Tensor, PackedSequence]:
            tokens, sequence = super().forward(videos, kept)
            where = sequence.coordinates.float()
            return where.expand(len(tokens), *where.shape), sequence

    encoder = Coordinates(TransformerSize(1, 24, 2), tubelet=(2, 8, 8))
    alignment = RepresentationAlignment(encoder, 1, frame_stride=2)
    found = alignment.features(torch.rand(1, 3, 17, 32, 32), TokenGrid(9, 8, 8))
    frames, rows, columns = found.reshape(9, 8, 8, 3).unbind(-1)
    # 9 of the 17 frames in 5 tubelets; twice as many tokens as tubelets along rows.
    torch.testing.assert_close(frames[:, 3, 3], torch.arange(9) / 2)
    expected = ((torch.arange(8) + 0.5) / 2 - 0.5).clamp(0, 3)
    torch.testing.assert_close(rows[4, :, 2], expected)
    torch.testing.assert_close(columns[4, 2], expected)


def test_latents_of_a_cache_are_decoded_for_the_encoder() -> None:
    torch.manual_seed(0)
    system = _system(RepresentationAlignment(_encoder(), 1))
    batch = _batch((5, 16, 16))
    with torch.no_grad():
        x_0 = system.tokenizer.encode(torch.stack(batch.pixels))
        pixels = system.tokenizer.decode(x_0)
    from_pixels = _losses(system, replace(batch, videos=list(batch.pixels)))
    cached = replace(batch, videos=None, latents=list(x_0))
    (found,) = batch_pixels(system.tokenizer, cached, x_0)
    torch.testing.assert_close(found, pixels)
    assert not torch.allclose(_losses(system, cached), from_pixels, atol=1e-6)


def test_what_cannot_be_aligned_is_refused() -> None:
    for arguments, message in (
        ({"block": 0}, "alignment.block = 0"),
        ({"block": 1, "frame_stride": 0}, "alignment.frame_stride = 0"),
        ({"block": 1, "weight": -1.0}, "alignment.weight = -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            RepresentationAlignment(_encoder(), **arguments)
    with pytest.raises(ValueError, match=r"alignment.block = 3: the denoiser has 2 blocks"):
        _system(RepresentationAlignment(_encoder(), 3))
    with pytest.raises(ValueError, match="needs a DiT, and the denoiser is a UViT"):
        RepresentationAlignment(_encoder(), 1).build(UViT(4, 16, TransformerSize(3, 24, 2)))


@pytest.fixture(scope="module")
def aligned_model(diffusion_model: dict[str, Any], tmp_path_factory: Any, fit: Any) -> Any:
    part = "sora_lightning.captioner."
    encoder = {
        "class_path": f"{part}VideoEncoder",
        "init_args": {"size": {"depth": 1, "width": 24, "num_heads": 2}, "tubelet": [2, 8, 8]},
    }
    init_args = {"encoder": encoder, "text": {"depth": 1, "width": 16, "num_heads": 2}}
    coca = {
        "class_path": f"{part}CoCa",
        "init_args": {**init_args, "vocab_size": 300, "context": 128},
    }
    captioner = {
        "class_path": "sora_lightning.systems.CaptionerSystem",
        "init_args": {"captioner": coca, "warmup_steps": 2},
    }
    folder = tmp_path_factory.mktemp("captioner")
    checkpoint = fit({"model": captioner}, folder, "--trainer.max_steps", "2")
    loaded = {
        "class_path": "sora_lightning.systems.alignment.load_video_encoder",
        "init_args": {"checkpoint": str(checkpoint)},
    }
    alignment = {
        "class_path": "sora_lightning.systems.alignment.RepresentationAlignment",
        "init_args": {"encoder": loaded, "block": 1, "hidden_width": 32},
    }
    model = deepcopy(diffusion_model)
    model["init_args"]["alignment"] = alignment
    return model, checkpoint


def test_an_aligned_training_resumes_and_needs_no_captioner_to_sample(
    fit: Any, aligned_model: Any, tmp_path: Path
) -> None:
    model, captioner = aligned_model
    whole = fit({"model": model}, tmp_path / "whole", "--trainer.max_steps", "4")
    fit({"model": model}, tmp_path / "parts", "--trainer.max_steps", "2")
    parts = fit(
        {"model": model}, tmp_path / "parts", "--trainer.max_steps", "4", "--ckpt_path", "last"
    )
    first, second = (torch.load(path, weights_only=True)["state_dict"] for path in (whole, parts))
    assert first.keys() == second.keys()
    names = [name for name in first if name.startswith("alignment.projector")]
    assert len(names) == 6
    assert first["alignment.projector.0.weight"].shape[0] == 32
    captioner.unlink()
    system = DiffusionSystem.from_checkpoint(whole)
    assert system.generate([""], "5x16x16", [0]).shape == (1, 3, 5, 16, 16)
