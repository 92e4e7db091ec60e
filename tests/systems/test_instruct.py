"""Edits by instruction: trained on pairs, conditioned by channels, weighed by two scales, and
sampled by the command line.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sora_lightning.cli.sample_tasks import read_video
from sora_lightning.conditioning import FirstFrames, MaskedLatents, VideoEditing
from sora_lightning.data.decoding.readers import read_frames
from sora_lightning.data.synthetic.render import write_dataset
from sora_lightning.denoisers import Denoiser
from sora_lightning.generation import seeded_noise
from sora_lightning.systems import DiffusionSystem
from sora_lightning.types import Condition, TokenGrid, VideoSize
from tests.systems.test_frame_tasks import at_time_zero, clip, conditioned, sample, with_channels

__all__ = ["clip"]

SOURCE = {"class_path": "sora_lightning.conditioning.VideoEditing"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    manifests = write_dataset(tmp_path_factory.mktemp("pairs"), 6, 2, 0, edits=True)
    paths = {"manifest": str(manifests["train"]), "val_manifest": str(manifests["val"])}
    return {**paths, "reading": {"sources": True}}


@pytest.fixture(scope="module")
def checkpoint(fit, diffusion_model, data, tmp_path_factory) -> Path:
    model = with_channels(diffusion_model, "MaskedLatents", [SOURCE])
    run_dir = tmp_path_factory.mktemp("instruct") / "run"
    return fit({"model": model, "data": data}, run_dir, "--trainer.max_steps=3")


def test_a_video_is_changed_by_an_instruction(checkpoint, clip):
    scales = ("--frame-guidance=1.5", "--guidance-scale=7.5")
    assert sample(checkpoint, "--task=instruct", "--video=in.mp4", *scales) == 0
    assert read_frames(Path("out.mp4"))[0].shape == (9, 16, 16, 3)


def test_what_was_not_trained_on_edits_is_refused(clip, fit, diffusion_model, tmp_path, capsys):
    other = fit({"model": diffusion_model}, tmp_path / "run", "--trainer.max_steps=1")
    assert sample(other, "--task=instruct", "--video=in.mp4") == 2
    assert "was not trained on edits (its masks have no VideoEditing)" in capsys.readouterr().err
    assert sample(other, "--task=instruct") == 2
    assert "--video is missing: --task instruct needs it" in capsys.readouterr().err


class Linear(Denoiser):
    """A velocity of which every part is known: 1, half of what is given, twice the text's mean."""

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        velocity = torch.ones_like(x_t) + 2 * condition.pooled.mean(1)[:, None, None, None, None]
        if condition.concat_latents is None:
            return velocity
        assert (condition.concat_latents[:, -1] == 1).all()
        return velocity + 0.5 * condition.concat_latents[:, :-1]


def test_two_scales_weigh_video_and_instruction_in_closed_form(checkpoint, clip, monkeypatch):
    """A constant velocity is followed exactly: noise minus u + s_I (i - u) + s_T (c - i)."""
    system = DiffusionSystem.from_checkpoint(checkpoint)
    system.denoiser = Linear(system.denoiser.patch)
    decoded: list[Tensor] = []
    decode = system.tokenizer.decode

    def record(latents: Tensor) -> Tensor:
        decoded.append(latents)
        return decode(latents)

    monkeypatch.setattr(system.tokenizer, "decode", record)
    monkeypatch.setattr(DiffusionSystem, "from_checkpoint", lambda *_: system)
    scales = ("--frame-guidance=1.5", "--guidance-scale=7.5", "--seed=4")
    assert sample(checkpoint, "--task=instruct", "--video=in.mp4", *scales) == 0
    with torch.no_grad():
        video = read_video("--video", clip, 8.0, VideoSize(9, 16, 16))
        source = system.tokenizer.encode(video)
        null, text = (system.conditioner([p]).pooled.mean() for p in ("", "a red square"))
    u, i, c = 1 + 2 * null, 1 + 2 * null + 0.5 * source, 1 + 2 * text + 0.5 * source
    noise = seeded_noise([4], 4, TokenGrid(5, 2, 2))
    expected = noise - (u + 1.5 * (i - u) + 7.5 * (c - i))
    torch.testing.assert_close(decoded[-1], expected, atol=1e-4, rtol=1e-4)


def test_clips_see_their_source_and_lose_it_by_their_uniform(checkpoint):
    system = DiffusionSystem.from_checkpoint(checkpoint)
    uniforms = torch.tensor([0.02, 0.07, 0.12, 0.5])  # no text, neither, no source, both
    x_0, source = torch.randn(2, 4, 4, 3, 2, 2)
    captions = ["make it blue"] * 4
    condition = conditioned(system, captions, uniforms, x_0, source)
    expected = MaskedLatents()(source, torch.ones(4, 1, 3, 2, 2, dtype=torch.bool))
    expected[1:3] = 0
    torch.testing.assert_close(condition.concat_latents, expected)
    null, full = (system.conditioner([text]).pooled for text in ("", captions[0]))
    for pooled, expected in zip(condition.pooled, (null, null, full, full), strict=True):
        torch.testing.assert_close(pooled[None], expected)


def test_in_a_mixture_other_tasks_show_the_clip_itself(checkpoint):
    system = DiffusionSystem.from_checkpoint(checkpoint)
    system.known_frames.masks = [VideoEditing(), FirstFrames(most=1)]
    x_0, source = torch.zeros(64, 4, 3, 2, 2), torch.ones(64, 4, 3, 2, 2)
    given = conditioned(system, ["x"] * 64, torch.ones(64), x_0, source).concat_latents
    whole = given[:, -1].flatten(1).all(1)
    assert 16 < whole.sum() < 48
    assert (given[whole] == 1).all()
    assert not given[~whole, :-1].any()
    assert (given[~whole, -1, 0] == 1).all()


def test_the_latents_of_pairs_are_encoded_and_trained_on(
    fit, diffusion_model, tokenizer_model, tokenizer_checkpoint, data, tmp_path
):
    """The loss of a step from the cache is that of the same step from the pixels."""
    encoding = {**data, "batching": {"windows_per_clip": 2}}
    last = ("--ckpt_path", str(tokenizer_checkpoint), "--latents.dtype=float32")
    fit({"model": tokenizer_model, "data": encoding}, tmp_path, *last, command="predict")
    model = with_channels(diffusion_model, "MaskedLatents", [SOURCE])
    weights = []
    latents = f"--data.latents={tmp_path / 'latents'}"
    for served in ("--data.batching.fixed_windows=true", latents):
        config = {"model": model, "data": encoding}
        one = fit(config, tmp_path / f"run{len(weights)}", "--trainer.max_steps=2", served)
        weights.append(DiffusionSystem.from_checkpoint(one).state_dict())
    for by_pixels, by_cache in zip(*(one.values() for one in weights), strict=True):
        torch.testing.assert_close(by_pixels, by_cache, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("data_changes", "said"),
    [
        (
            {"reading": {"sources": False}},
            "VideoEditing and data.reading.sources is not set",
        ),
        ({"manifest": None}, r"train\.jsonl: source is missing in the row of 0000\d\.mp4"),
    ],
)
def test_an_instruct_experiment_without_sources_is_refused(
    fit, diffusion_model, clips, data, tmp_path, data_changes, said
):
    if "manifest" in data_changes:
        data_changes = {"manifest": str(clips["train"])}
    model = with_channels(diffusion_model, "MaskedLatents", [SOURCE])
    with pytest.raises(ValueError, match=said):
        fit({"model": model, "data": {**data, **data_changes}}, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_sources_without_channels_are_refused(fit, diffusion_model, data, tmp_path):
    arguments = {**diffusion_model["init_args"], "known_frames": at_time_zero([SOURCE])}
    model = {**diffusion_model, "init_args": arguments}
    with pytest.raises(ValueError, match="masks has VideoEditing: a source is shown by channels"):
        fit({"model": model, "data": data}, tmp_path / "run", "--trainer.max_steps=1")


def test_an_experiment_that_has_no_use_for_sources_trains_on_their_manifest(
    fit, diffusion_model, data, tmp_path
):
    for sources in (False, True):
        config = {"model": diffusion_model, "data": {**data, "reading": {"sources": sources}}}
        fit(config, tmp_path / f"run{sources}", "--trainer.max_steps=1")
