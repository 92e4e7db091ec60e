"""How frames follow one another, on videos whose motion is known."""

from __future__ import annotations

import pytest
import torch
from einops import repeat
from torch import Tensor
from torch.nn import functional as F

from evaluation.metrics.motion import (
    Motion,
    TemporalConsistency,
    consistency,
    consistency_with_first,
    dynamic_degree,
    flicker,
    motion_smoothness,
)


def ramp(step: int) -> Tensor:
    """Every pixel rises by ``step`` levels a frame."""
    levels = (step * torch.arange(6)).to(torch.uint8)
    return repeat(levels, "F -> 1 c F h w", c=3, h=4, w=4)


def test_known_changes_give_known_scores() -> None:
    assert float(flicker(ramp(20))) == pytest.approx(1 - 20 / 255)
    assert float(dynamic_degree(ramp(20))) == 1
    assert float(dynamic_degree(ramp(15))) == 0  # grain
    assert float(motion_smoothness(ramp(20))) == pytest.approx(1)  # a straight line
    half = ramp(0).clone()
    half[:, :, 3:, :2] = 200  # half of the pixels jump once in five steps
    assert float(dynamic_degree(half)) == pytest.approx(0.5 / 5)
    assert float(flicker(half)) == pytest.approx(1 - 0.5 * 200 / 255 / 5)
    # Frames 2 and 3 lie 100 levels from the mean of their neighbours, in half of the pixels.
    assert float(motion_smoothness(half)) == pytest.approx(1 - 2 * 0.5 * 100 / 255 / 4)


def test_a_still_is_perfect_but_for_its_dynamic_degree() -> None:
    motion = Motion()
    motion.update(ramp(0), ids=[0])
    motion.update(ramp(0), ids=[0])
    scores = {name: float(value) for name, value in motion.compute().items()}
    assert scores == {
        "flicker": 1.0,
        "proxy/dynamic_degree": 0.0,
        "proxy/motion_smoothness": 1.0,
    }


def test_shuffled_frames_are_less_smooth() -> None:
    video = ramp(20)
    assert motion_smoothness(video[:, :, [0, 3, 1, 5, 2, 4]]) < motion_smoothness(video)


class Colour:
    """Embeds a frame as the direction of its mean colour."""

    def embed_frames(self, videos: Tensor) -> Tensor:
        return F.normalize(videos.double().mean(dim=(3, 4)).transpose(1, 2) + 1e-6, dim=-1)


def test_consistency_of_a_still_is_one_and_of_a_jump_what_it_is() -> None:
    still = ramp(0) + 9
    video = torch.zeros(1, 3, 3, 2, 2, dtype=torch.uint8)
    video[:, 0, 0], video[:, 1, 1], video[:, 0, 2] = 255, 255, 255  # red, green, red
    metric = TemporalConsistency(Colour())
    metric.update(still, ids=[0])
    assert metric.compute() == {
        "consistency": pytest.approx(1),
        "consistency_with_first": pytest.approx(1),
    }
    frames = Colour().embed_frames(video)
    assert float(consistency(frames)) == pytest.approx(0, abs=1e-6)
    # Green beside red twice 0; red beside green 0, beside the first frame 1.
    assert float(consistency_with_first(frames)) == pytest.approx((0 + 0.5) / 2, abs=1e-6)


def test_too_few_frames_and_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="frames >= 2"):
        flicker(ramp(0)[:, :, :1])
    with pytest.raises(ValueError, match="frames >= 3"):
        motion_smoothness(ramp(0)[:, :, :2])
    with pytest.raises(ValueError, match="must be uint8"):
        dynamic_degree(ramp(0).float())
