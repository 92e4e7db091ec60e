"""An image's tokens train with the denoiser, are dropped with its channels, and make it move."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sora_lightning.data.decoding.readers import read_frames
from sora_lightning.systems import DiffusionSystem
from sora_lightning.systems.draws import GroupDraws
from sora_lightning.types import VideoBatch
from tests.conditioning.test_images import TOWER
from tests.systems.test_frame_tasks import clip, conditioned, sample, with_channels

__all__ = ["clip"]

_PARTS = "sora_lightning.conditioning"
ANIMATE = {"class_path": f"{_PARTS}.FirstFrames", "init_args": {"most": 1}}


def seeing(diffusion_model, kind: str, **arguments: object):
    encoder = {"class_path": f"{_PARTS}.{kind}", "init_args": arguments}
    return with_channels(diffusion_model, "FirstFrameAndPosition", [ANIMATE], image_encoder=encoder)


@pytest.fixture(scope="module")
def checkpoint(fit, diffusion_model, tmp_path_factory) -> Path:
    model = seeing(diffusion_model, "GlobalEncoder", hidden=8, side=2)
    return fit({"model": model}, tmp_path_factory.mktemp("global") / "run", "--trainer.max_steps=4")


@pytest.mark.parametrize("guided", [(), ("--frame-guidance=1.5", "--guidance-scale=3")])
def test_an_image_moves(checkpoint, clip, guided):
    assert sample(checkpoint, "--task=animate", "--video=in.png", *guided) == 0
    assert read_frames(Path("out.mp4"))[0].shape == (9, 16, 16, 3)


def test_the_encoder_trains(checkpoint):
    """The last layer's gradient reaches it once the denoiser's zero layers have moved."""
    content = torch.load(checkpoint, weights_only=True)
    torch.manual_seed(0)
    states = content["optimizer_states"][0]["state"].values()
    assert len(list(states)) > 0
    system = DiffusionSystem.from_checkpoint(checkpoint)
    system.requires_grad_(True)
    batch = VideoBatch(["x"] * 8, 8.0, ["a"] * 8, latents=torch.randn(8, 4, 3, 2, 2))
    rng = GroupDraws([torch.Generator().manual_seed(0)], 8)
    system.losses(batch, rng).mean().backward()
    parameters = system.known_frames.image_encoder.parameters()
    assert all(p.grad is not None and p.grad.any() for p in parameters)


def test_the_tokens_are_dropped_with_the_channels(checkpoint):
    system = DiffusionSystem.from_checkpoint(checkpoint)
    uniforms = torch.tensor([0.02, 0.07, 0.12, 0.5])  # no text, neither, no image, both
    condition = conditioned(system, ["a red circle"] * 4, uniforms, torch.randn(4, 4, 3, 2, 2))
    assert condition.mask[:, -4:].all(1).tolist() == [True, False, False, True]
    assert condition.mask[:, -4:].any(1).tolist() == [True, False, False, True]
    assert condition.concat_latents.flatten(1).any(1).tolist() == [True, False, False, True]
    text = system.conditioner(["a red circle"])
    torch.testing.assert_close(condition.tokens[3:, : text.tokens.shape[1]], text.tokens)


def test_a_clip_in_a_folder_trains_and_its_checkpoint_needs_no_folder(
    fit, diffusion_model, clip, tmp_path
):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(**TOWER)
    tower = transformers.CLIPVisionModelWithProjection(config)
    tower.save_pretrained(tmp_path / "clip")
    model = seeing(diffusion_model, "ClipEncoder", folder=str(tmp_path / "clip"), side=2)
    checkpoint = fit({"model": model}, tmp_path / "run", "--trainer.max_steps=2")
    shutil.rmtree(tmp_path / "clip")
    kept = DiffusionSystem.from_checkpoint(checkpoint).known_frames.image_encoder.tower.state_dict()
    for name, value in tower.state_dict().items():
        torch.testing.assert_close(kept[name], value)
    assert sample(checkpoint, "--task=animate", "--video=in.png") == 0
    assert read_frames(Path("out.mp4"))[0].shape == (9, 16, 16, 3)


def test_an_image_that_no_block_attends_to_is_refused(fit, diffusion_model, tmp_path):
    model = seeing(diffusion_model, "GlobalEncoder")
    denoiser = model["init_args"]["denoiser"]
    blind = {"condition": {"class_path": "sora_lightning.denoisers.conditions.NoCondition"}}
    changed = {**denoiser, "init_args": {**denoiser["init_args"], "parts": blind}}
    model = {**model, "init_args": {**model["init_args"], "denoiser": changed}}
    with pytest.raises(ValueError, match="NoCondition has no block attend to tokens"):
        fit({"model": model}, tmp_path / "b", "--trainer.max_steps=1")
