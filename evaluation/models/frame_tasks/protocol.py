"""How the tasks are made and judged: all that moves a rate but the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskProtocol:
    """Numbers of frames are at ``fps`` of the model. ``sizes`` and ``new_size`` are height and
    width; the model was trained on the first and on two lengths, ``frames`` and ``long_frames``,
    and neither on ``new_size`` nor on ``new_frames``.

    ``context`` frames are given of each video. ``join_guidance`` is that of connections and loops:
    their two ends say what the motion is, of which the prompt names one direction alone.
    ``strength`` is the share of the sampler's steps that an edit takes, with ``edit_guidance`` on
    the new prompt and ``source_guidance`` on the video's own; ``times`` how many windows long the
    long video is, whose contexts are seen at ``context_noise``. ``cache_intervals`` are those of
    ``FeatureCaching`` that are measured.
    """

    cases: int = 64
    sizes: tuple[tuple[int, int], ...] = ((32, 32), (24, 40), (40, 24))
    new_size: tuple[int, int] = (24, 32)
    frames: int = 17
    long_frames: int = 25
    new_frames: int = 33
    context: int = 9
    num_steps: int = 25
    guidance_scale: float = 2.0
    join_guidance: float = 1.0
    strength: float = 0.56
    edit_guidance: float = 6.0
    source_guidance: float = 6.0
    times: int = 4
    context_noise: float = 0.1
    cache_intervals: tuple[int, ...] = (2, 3)

    def __post_init__(self) -> None:
        if self.cases < 1 or self.num_steps < 1:
            raise ValueError(f"--cases {self.cases}, --steps {self.num_steps}: must be at least 1")
        if not self.frames < self.long_frames < self.new_frames:
            raise ValueError(
                f"--frames {self.frames},{self.long_frames},{self.new_frames}: must be three "
                "rising numbers: the lengths of the training, and a longer one"
            )
        if self.new_size in self.sizes:
            raise ValueError(f"--new-size {self.new_size}: is one of --sizes already")
        if self.frames <= self.context:
            raise ValueError(
                f"--context {self.context}: leaves nothing to make in {self.frames} frames"
            )
        if self.long_frames < 2 * self.context + 1:
            raise ValueError(
                f"--context {self.context}: both ends together leave nothing to make in "
                f"{self.long_frames} frames"
            )
