"""Drawing samples while a model trains leaves the training as it was."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sora_lightning.callbacks.samples import (
    ReconstructVideos,
    SampleVideos,
    log_video,
    moving_png,
    undisturbed,
)
from sora_lightning.callbacks.scores import ScoreVideos, VideoScore
from sora_lightning.conditioning import TextConditioner
from sora_lightning.denoisers import DiT
from sora_lightning.generation import GuidanceConfig, SamplingConfig
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems import DiffusionSystem
from sora_lightning.tokenizers import ConvTokenizer

FIVE_CHANNELS = GuidanceConfig(channels=5)


def test_random_state_and_modes_are_as_before_even_after_an_error() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    module.train()
    module[1].eval()
    before = torch.random.get_rng_state()

    def draw_and_fail() -> None:
        with undisturbed(module):
            assert not any(part.training for part in module.modules())
            assert not module(torch.rand(1, 2)).requires_grad
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        draw_and_fail()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [part.training for part in module.modules()] == [True, True, False, False, False]
    assert torch.is_grad_enabled()


def test_a_moving_png_keeps_every_pixel_and_the_rate() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)
    image = Image.open(io.BytesIO(moving_png(frames, fps=8)))
    for index, frame in enumerate(frames):
        image.seek(index)
        assert np.array_equal(np.asarray(image.convert("RGB")), frame)
        assert image.info["duration"] == pytest.approx(125)
    assert image.n_frames == 5


def _system() -> DiffusionSystem:
    tokenizer = ConvTokenizer(4, [8, 16], down_time=[True], down_space=[True], patch=4)

    def denoiser(channels: int, width: int) -> DiT:
        return DiT(channels, width, size=TransformerSize(1, 16, 2), patch=(1, 2, 2))

    return DiffusionSystem(tokenizer, TextConditioner(16, 1, 2), denoiser)


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (SampleVideos(["a"], "17x30x32"), "SampleVideos: size = 17x30x32: .*height 30"),
        (SampleVideos(["a"], "17x24x32"), "SampleVideos: size = 17x24x32: "),
        (SampleVideos(["a"], "16x32x32"), "SampleVideos: size = 16x32x32: .*16 frames"),
        (
            SampleVideos(["a"], "17x32x32", sampling=SamplingConfig(guidance=FIVE_CHANNELS)),
            r"guidance\.channels = 5: the latents have 4",
        ),
        (ScoreVideos([cast(VideoScore, None)], ["a"], "17x24x32"), "ScoreVideos: size = 17x24x32"),
        (
            ScoreVideos(
                [cast(VideoScore, None)],
                ["a"],
                "17x32x32",
                sampling=SamplingConfig(guidance=FIVE_CHANNELS),
            ),
            r"guidance\.channels = 5: the latents have 4",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_the_first_step(
    callback: SampleVideos | ScoreVideos, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        callback.setup(None, _system(), "fit")  # type: ignore[arg-type]
    SampleVideos(["a"], "17x32x32").setup(None, _system(), "fit")  # type: ignore[arg-type]


def test_a_video_that_is_not_finite_is_not_logged() -> None:
    trainer = SimpleNamespace(is_global_zero=True, loggers=[])
    with pytest.warns(UserWarning, match="samples/a: the video is not finite"):
        log_video(trainer, "samples/a", torch.full((3, 1, 8, 8), torch.nan), 8.0)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: SampleVideos([], "17x32x32"), "prompts = "),
        (lambda: SampleVideos(["a"], "32x32"), "not a video size"),
        (lambda: SampleVideos(["a"], "17x32x32", every_n_validations=0), "every_n_validations = 0"),
        (lambda: ReconstructVideos(0), "num_clips = 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(build: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()  # type: ignore[operator]
