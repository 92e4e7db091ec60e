"""Sampling and measurement settings of the tasks: everything that affects a rate but the model."""

from __future__ import annotations

from dataclasses import dataclass

from sora_lightning.generation import SamplingConfig


@dataclass(frozen=True)
class TaskProtocol:
    """Settings of the measurement; numbers of frames are at the model's frame rate.

    Args:
        cases: Number of videos of each task.
        sizes: Heights and widths used in training.
        new_size: Height and width not used in training.
        frames: Shorter length used in training, and of a window.
        long_frames: Longer length used in training, and of a window that connects two videos.
        new_frames: Length not used in training.
        context: Number of given frames of each video.
        sampling: Sampling options, unless overridden below.
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
    sizes: tuple[tuple[int, int], ...] = ((32, 32), (24, 40), (40, 24))
    new_size: tuple[int, int] = (24, 32)
    frames: int = 17
    long_frames: int = 25
    new_frames: int = 33
    context: int = 9
    sampling: SamplingConfig = SamplingConfig(num_steps=25)
    join_guidance: float = 1.0
    strength: float = 0.56
    edit_guidance: float = 6.0
    source_guidance: float = 6.0
    times: int = 4
    context_noise: float = 0.1
    cache_intervals: tuple[int, ...] = (2, 3)

    def __post_init__(self) -> None:
        if self.cases < 1:
            raise ValueError(f"--cases {self.cases}: must be at least 1")
        if not self.frames < self.long_frames < self.new_frames:
            raise ValueError(
                f"--frames {self.frames},{self.long_frames},{self.new_frames}: must be three "
                "rising numbers: the lengths of the training, and a longer one"
            )
        if self.new_size in self.sizes:
            raise ValueError(f"--new-size {self.new_size}: is one of --sizes already")
        if self.frames <= self.context:
            raise ValueError(
                f"--context {self.context}: leaves no new frames in {self.frames} frames"
            )
        if self.long_frames < 2 * self.context + 1:
            raise ValueError(
                f"--context {self.context}: both ends together leave nothing to make in "
                f"{self.long_frames} frames"
            )
