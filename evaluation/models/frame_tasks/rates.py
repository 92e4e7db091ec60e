"""Videos of every task, and the rates measured on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evaluation.inputs import as_batch
from evaluation.metrics.reconstruction import psnr_per_clip
from evaluation.metrics.shapes import COLOURS
from evaluation.metrics.tracks import seam_ratio
from evaluation.models.frame_tasks import making
from evaluation.models.frame_tasks.cases import Case, Video, in_colour, turned_round
from evaluation.models.frame_tasks.making import Make, Windows, make_videos
from evaluation.models.frame_tasks.protocol import TaskProtocol
from evaluation.models.frame_tasks.rules import (
    Mean,
    Rate,
    follows,
    frame_psnr,
    keeps_colour,
    moves,
    moves_evenly,
    shows,
)
from sora_lightning.denoisers import FeatureCaching
from sora_lightning.generation import SamplingConfig, VideoGenerator
from sora_lightning.types import height_and_width

_LEAST_PSNR, _LARGEST_SEAM = 40.0, 1.5
ATTRIBUTES = ("colour", "direction", "shape")


@dataclass(frozen=True)
class Outcome:
    """Cases of a task, the videos made from them, and rates by name."""

    cases: Sequence[Case]
    videos: Sequence[Video]
    rates: dict[str, Rate | Mean]


@dataclass(frozen=True)
class Trial:
    """A model, its cases, and the settings of the tasks."""

    video_generator: VideoGenerator
    cases: list[Case]
    pairs: list[Case]
    protocol: TaskProtocol

    @property
    def windows(self) -> Windows:
        protocol = self.protocol
        return Windows(*protocol.frames, protocol.context)

    def make(
        self,
        task: str,
        make: Make,
        cases: Sequence[Case] | None = None,
        windows: Windows | None = None,
        sampling: SamplingConfig | None = None,
    ) -> list[Video]:
        video_generator = replace(
            self.video_generator, sampling=sampling or self.video_generator.sampling
        )
        return make_videos(
            task, make, video_generator, cases or self.cases, windows or self.windows
        )

    def guided(self, scale: float) -> SamplingConfig:
        """The sampling options with another guidance scale."""
        sampling = self.video_generator.sampling
        return replace(sampling, guidance=replace(sampling.guidance, scale=scale))


def extend(trial: Trial) -> Outcome:
    """Extend the first ``context`` frames of the real clips."""
    start, cases = trial.protocol.context, trial.cases
    videos = trial.make("extend", making.extend)
    back = trial.make("reconstruct", making.reconstructed(trial.protocol.frames[0]))
    decoded = trial.make("reconstruct the given frames", making.reconstructed(start))
    # One given frame shows the start of the motion.
    made = [video[start - 1 :] for video in videos]
    whole = [video[start - 1 :] for video in back]
    two, real = ("colour", "shape"), "the real frames reconstructed by the tokenizer."
    rates: dict[str, Rate | Mean] = {
        "extend/colour_and_shape": _share(
            shows, made, cases, "New frames: colour and shape as given.", two, 0.9
        ),
        "extend/direction": _share(
            shows, made, cases, "New frames: the motion continues.", ("direction",), 0.8
        ),
        "extend/colour": _share(shows, made, cases, "New frames: colour as given.", ("colour",)),
        "ceiling/extend/colour_and_shape": _share(shows, whole, cases, real, two),
        "ceiling/extend/direction": _share(
            shows,
            whole,
            cases,
            real,
            ("direction",),
        ),
    }
    through = tuple(seam_ratio(video, [start]) <= _LARGEST_SEAM for video in back)
    rates["ceiling/seam/extend/no_jump"] = Rate(through, f"Change across the seam: {real}")
    return Outcome(cases, videos, rates | _seams("extend", videos, [start], decoded, start - 1))


def extend_backward(trial: Trial) -> Outcome:
    start, cases = trial.protocol.context, trial.cases
    first_context = trial.protocol.frames[0] - start
    videos = trial.make("extend backward", making.extend_backward)
    ends = [replace(case, video=case.video[-start:]) for case in cases]
    decoded = trial.make("reconstruct the given frames", making.reconstructed(start), ends)
    made = [video[: first_context + 1] for video in videos]
    meaning = "New frames, before the given: colour and direction as given."
    rates: dict[str, Rate | Mean] = {
        "extend_backward/colour_and_direction": _share(
            shows, made, cases, meaning, ("colour", "direction")
        )
    }
    seams = _seams("extend_backward", videos, [first_context], decoded, first_context, 0)
    return Outcome(cases, videos, rates | seams)


def animate(trial: Trial) -> Outcome:
    videos = trial.make("animate", making.animate)
    decoded = trial.make("reconstruct the image", making.reconstructed(1))
    rates: dict[str, Rate | Mean] = {
        "animate/colour_and_direction": _share(
            shows,
            videos,
            trial.cases,
            "The image moves as the prompt says, in its colour.",
            ("colour", "direction"),
        )
    }
    return Outcome(trial.cases, videos, rates | _seams("animate", videos, [1], decoded, 0))


def connect(trial: Trial) -> Outcome:
    """Connect two rendered videos of one shape, with a gap of a second between them."""
    context = trial.protocol.context
    gap = trial.protocol.frames[1] - 2 * context
    sampling = trial.guided(trial.protocol.join_guidance)
    videos = trial.make("connect", making.connect, trial.pairs, sampling=sampling)
    decoded = trial.make("reconstruct the given frames", making.reconstructed(context), trial.pairs)
    cut = [
        np.concatenate([case.video, case.second_video])
        for case in trial.pairs
        if case.second_video is not None
    ]
    rates: dict[str, Rate | Mean] = {
        "connect/no_jump": Rate(
            tuple(moves_evenly(video) for video in videos),
            "The shape is in every frame, and no step is longer than 0.08 short sides.",
            0.8,
        ),
        "connect/colour": Rate(
            tuple(
                shows(video[context - 1 : context + gap + 1], case.expected, ("colour",))
                for video, case in zip(videos, trial.pairs, strict=True)
            ),
            "New frames: colour as given.",
        ),
        "floor/connect/no_jump": Rate(
            tuple(moves_evenly(video) for video in cut),
            "The two given videos in succession, without frames in between.",
        ),
    }
    seams = _seams("connect", videos, [context, context + gap], decoded, context - 1)
    return Outcome(trial.pairs, videos, rates | seams)


def loop(trial: Trial) -> Outcome:
    """Loop the first ``context`` frames of the real clips."""
    context, cases = trial.protocol.context, trial.cases
    back = [turned_round(case) for case in cases]
    sampling = trial.guided(trial.protocol.join_guidance)
    videos = trial.make("loop", making.loop, back, sampling=sampling)
    decoded = trial.make("reconstruct the given frames", making.reconstructed(context))
    rates: dict[str, Rate | Mean] = {
        "loop/closes": Rate(
            tuple(moves_evenly(video, closed=True) for video in videos),
            "The shape is in every frame, and no step is longer than 0.08 short sides, including "
            "the step from the last frame to the first.",
            0.8,
        ),
        "floor/loop/closes": Rate(
            tuple(moves_evenly(case.video[:context], closed=True) for case in cases),
            "The given frames alone, repeated.",
        ),
    }
    seams = _seams("loop", videos, [context], decoded, context - 1, closed=True)
    return Outcome(back, videos, rates | seams)


def inpaint(trial: Trial) -> Outcome:
    """Inpaint the left half of the frames after the context."""
    protocol, cases = trial.protocol, trial.cases
    videos = trial.make("inpaint", making.inpaint)
    back = trial.make("reconstruct", making.reconstructed(protocol.frames[0]))
    kept = tuple(
        frame_psnr(video[-1][:, -width:], other[-1][:, -width:]) >= _LEAST_PSNR
        for video, other in zip(videos, back, strict=True)
        for width in [video.shape[2] // 4]
    )
    rates: dict[str, Rate | Mean] = {
        "inpaint/kept": Rate(
            kept,
            "The unmasked part has a PSNR of 40 dB or more to its reconstruction by the tokenizer.",
        ),
        "inpaint/colour_and_direction": _share(
            shows, videos, cases, "The video still shows its prompt.", ("colour", "direction")
        ),
    }
    return Outcome(cases, videos, rates)


def edit(trial: Trial) -> Outcome:
    """Edit the real clips with another colour in the prompt: by both prompts, and by the new one
    alone.
    """
    protocol = trial.protocol
    cases = [in_colour(case, other_colour(case, i)) for i, case in enumerate(trial.cases)]
    sampling = trial.guided(protocol.edit_guidance)
    by_both = making.edit(protocol.strength, protocol.source_guidance)
    videos = trial.make("edit", by_both, cases, sampling=sampling)
    by_noise = making.sdedit(protocol.strength)
    others = trial.make("edit by noise alone", by_noise, cases, sampling=sampling)
    rates = _edited("edit", videos, cases, 0.7) | _edited("edit_sdedit", others, cases, None)
    return Outcome(cases, videos, rates)


def _edited(
    task: str, videos: Sequence[Video], cases: Sequence[Case], goal: float | None
) -> dict[str, Rate | Mean]:
    pairs = list(zip(videos, cases, strict=True))
    new = [shows(video, case.expected, ("colour",)) for video, case in pairs]
    motion = [moves(v, c.expected.direction) and follows(v, c.video) for v, c in pairs]
    return {
        f"{task}/colour_and_motion": Rate(
            tuple(a and b for a, b in zip(new, motion, strict=True)),
            "The colour is the requested one, the direction is the video's, and the shape stays "
            "within 0.1 short sides of its track.",
            goal,
        ),
        f"{task}/colour": Rate(tuple(new), "The colour is the requested one."),
        f"{task}/motion": Rate(tuple(motion), "Direction and track are the video's."),
    }


def long(trial: Trial) -> Outcome:
    protocol, cases = trial.protocol, trial.cases
    videos = trial.make("long", making.long(protocol.times, protocol.context_noise))
    kept = [
        keeps_colour(video, case.expected, protocol.times)
        for video, case in zip(videos, cases, strict=True)
    ]
    meaning = f"Each of {protocol.times} equal parts shows the prompt's colour and no other."
    return Outcome(cases, videos, {"long/colour": Rate(tuple(kept), meaning, 0.8)})


def sizes(trial: Trial) -> dict[str, Outcome]:
    """Generate from text at the training sizes, at another aspect ratio, and longer."""
    protocol = trial.protocol
    lengths = trial.windows
    outcomes = {}
    new_size = height_and_width(protocol.new_size, "--new-size")
    new = [_in_size(case, new_size) for case in trial.cases]
    for name, cases, num_frames in (
        ("trained", trial.cases, protocol.frames[0]),
        ("trained_longer", trial.cases, protocol.frames[1]),
        ("new_aspect", new, protocol.frames[0]),
        ("new_length", trial.cases, protocol.new_frames),
    ):
        windows = replace(lengths, short=num_frames)
        videos = trial.make(f"text, {name}", making.text, cases, windows)
        rates: dict[str, Rate | Mean] = {
            f"size/{name}/{attribute}": _share(
                shows, videos, cases, "Alignment with the prompt.", (attribute,)
            )
            for attribute in ATTRIBUTES
        }
        outcomes[f"size_{name}"] = Outcome(cases, videos, rates)
    return outcomes


def caching(trial: Trial) -> Outcome:
    """Generate from text with the middle blocks skipped at some steps.

    The error is measured against videos of the same noise made with all blocks.
    """
    protocol, cases = trial.protocol, trial.cases
    exact = trial.make("text, all blocks", making.text)
    videos, rates = list(exact), dict[str, Rate | Mean]()
    for interval in (1, *protocol.cache_intervals):
        sampling = replace(trial.video_generator.sampling, cache=FeatureCaching(interval))
        title = f"text, blocks at every step of {interval}"
        videos = trial.make(title, making.text, sampling=sampling)
        name = f"cache/{interval}"
        psnr = [
            float(psnr_per_clip(as_batch([a]), as_batch([b]))[0])
            for a, b in zip(videos, exact, strict=True)
        ]
        meaning = "PSNR to the video of the same noise made with all blocks; 100 for equal videos."
        rates[f"{name}/psnr"] = Mean(tuple(psnr), meaning, "dB")
        for attribute in ATTRIBUTES:
            meaning = "Alignment with the prompt."
            rates[f"{name}/{attribute}"] = _share(shows, videos, cases, meaning, (attribute,))
    return Outcome(cases, videos, rates)


def other_colour(case: Case, index: int) -> str:
    """Return a colour other than the video's; all are used equally often."""
    others = [colour for colour in COLOURS if colour != case.expected.colour]
    return others[index % len(others)]


def _in_size(case: Case, size: tuple[int, int]) -> Case:
    """The case with a blank video of another size."""
    return replace(case, video=np.zeros((1, *size, 3), np.uint8))


def _share(
    rule: Callable[..., bool],
    videos: Sequence[Video],
    cases: Sequence[Case],
    meaning: str,
    attributes: Sequence[str],
    goal: float | None = None,
) -> Rate:
    right = (rule(v, c.expected, attributes) for v, c in zip(videos, cases, strict=True))
    return Rate(tuple(right), meaning, goal)


def _seams(
    task: str,
    videos: Sequence[Video],
    seams: list[int],
    decoded: Sequence[Video],
    frame: int,
    context_frame: int | None = None,
    closed: bool = False,
) -> dict[str, Rate | Mean]:
    """Rates of seams at which the known frame is kept, and at which the video does not jump."""
    context_frame = frame if context_frame is None else context_frame
    same = tuple(
        frame_psnr(video[frame], other[context_frame]) >= _LEAST_PSNR
        for video, other in zip(videos, decoded, strict=True)
    )
    ratios = tuple(seam_ratio(video, seams, closed) for video in videos)
    even = tuple(ratio <= _LARGEST_SEAM for ratio in ratios)
    return {
        f"seam/{task}/known_frame": Rate(
            same,
            "The known frame at the seam has a PSNR of 40 dB or more to its reconstruction.",
            1.0,
        ),
        f"seam/{task}/no_jump": Rate(
            even,
            "The change across the seam is at most 1.5 times the median change inside; half of "
            "the videos is to say that the median one's is.",
            0.5,
        ),
    }
