"""Sampling and measurement settings of the tasks: everything that affects a rate but the model."""

from __future__ import annotations

from dataclasses import dataclass

from sora_lightning.checks import require_at_least
from sora_lightning.types import height_and_width


@dataclass(frozen=True)
class TaskProtocol:
    """Settings of the measurement; numbers of frames are at the model's frame rate.

    Args:
        cases: Number of videos of each task.
        sizes: Training sizes, height x width: ``32x32,24x40``.
        new_size: Size not used in training.
        frames: The two training lengths, ``17,25``: that of a window, and of a window that connects
            two videos.
        new_frames: Longer length not used in training.
        context: Number of given frames of each video.
        steps: Steps of the sampler.
        join_guidance: Guidance scale of connections and loops. Their two ends determine the
            motion, while the prompt names only one direction.
        strength: Share of the sampler's steps used by an edit.
        edit_guidance: Guidance scale of the target prompt of an edit.
        source_guidance: Guidance scale of the prompt that describes the edited video.
        times: Length of the long video in windows.
        context_noise: Diffusion time of the long video's context frames.
        cache_intervals: Intervals of ``FeatureCaching`` to measure.
    """

    cases: int = 64
    sizes: tuple[str, ...] = ("32x32", "24x40", "40x24")
    new_size: str = "24x32"
    frames: tuple[int, int] = (17, 25)
    new_frames: int = 33
    context: int = 9
    steps: int = 25
    join_guidance: float = 1.0
    strength: float = 0.56
    edit_guidance: float = 6.0
    source_guidance: float = 6.0
    times: int = 4
    context_noise: float = 0.1
    cache_intervals: tuple[int, ...] = (2, 3)

    def __post_init__(self) -> None:
        require_at_least(1, cases=self.cases)
        short, long = self.frames
        if not short < long < self.new_frames:
            raise ValueError(
                f"--frames {short},{long},{self.new_frames}: must be three "
                "rising numbers: the lengths of the training, and a longer one"
            )
        for option, size in (("new-size", self.new_size), *(("sizes", one) for one in self.sizes)):
            height_and_width(size, f"--{option}")
        if self.new_size in self.sizes:
            raise ValueError(f"--new-size {self.new_size}: is one of --sizes already")
        if short <= self.context:
            raise ValueError(f"--context {self.context}: leaves no new frames in {short} frames")
        if long < 2 * self.context + 1:
            raise ValueError(
                f"--context {self.context}: both ends together leave nothing to make in "
                f"{long} frames"
            )
