"""Drawing samples while a model trains leaves the training as it was."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sora_lightning.callbacks.samples import (
    ReconstructVideos,
    SampleVideos,
    moving_png,
    undisturbed,
)


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
