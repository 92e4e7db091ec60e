"""The tasks of ``sample``: which inputs each takes, and how it makes its videos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning import generation
from sora_lightning.checks import naming, require_file
from sora_lightning.data.batching.buckets import fit_frames
from sora_lightning.data.decoding.readers import read_frames
from sora_lightning.generation import SamplingConfig, VideoGenerator
from sora_lightning.types import VideoSize


@dataclass(frozen=True)
class TaskInputs:
    """Inputs that only some tasks take.

    Args:
        video: Video, or for animate the image, that the task starts from.
        to: Video that connect ends with.
        mask: Video or image that is white where inpaint paints.
        frames: Frames of context that each window sees, 1 + a multiple of the frames in a latent
            frame. By default two latent frames.
        total_frames: Frames of the result. By default one window adds what it has room for.
        strength: How much of the video edit may change, from 0 (nothing) to 1 (everything).
        source_prompt: What the video shows before the edit: then only the difference to the prompt
            is applied.
    """

    video: Path | None = None
    to: Path | None = None
    mask: Path | None = None
    frames: int | None = None
    total_frames: int | None = None
    strength: float | None = None
    source_prompt: str | None = None

    @property
    def files(self) -> dict[str, Path]:
        """Return the given files by flag."""
        named = {"video": self.video, "to": self.to, "mask": self.mask}
        return {flag: path for flag, path in named.items() if path is not None}

    @property
    def given(self) -> set[str]:
        """Return the names of the given inputs."""
        return {one.name for one in fields(self) if getattr(self, one.name) is not None}


@dataclass(frozen=True)
class Job:
    """A batch of prompts of one size, each with a seed, and the inputs that they share."""

    video_generator: VideoGenerator
    prompts: list[str]
    seeds: list[int]
    size: VideoSize
    fps: float
    inputs: TaskInputs

    @property
    def model(self) -> tuple[VideoGenerator, list[str], list[int]]:
        """The first three arguments of the functions in ``generation``."""
        return self.video_generator, self.prompts, self.seeds

    @property
    def window(self) -> int:
        """Number of frames that are sampled at a time."""
        return self.size.num_frames

    @property
    def context(self) -> int:
        """Number of context frames, two latent frames by default."""
        default = 1 + self.video_generator.tokenizer.compression.frames
        return default if self.inputs.frames is None else self.inputs.frames

    def read(self, flag: str) -> Float[Tensor, "b 3 _F H W"]:
        """Read the video of a flag at the model's frame rate and in the size of the job."""
        video = read_video(f"--{flag}", self.inputs.files[flag], self.fps, self.size)
        device = self.video_generator.tokenizer.latent_mean.device
        return video.to(device).expand(len(self.prompts), -1, -1, -1, -1)

    def read_window(self, flag: str) -> Float[Tensor, "b 3 F H W"]:
        """Read the first ``window`` frames. Raises ``ValueError`` where the video is shorter."""
        video = self.read(flag)
        if video.shape[2] < self.window:
            raise ValueError(
                f"--{flag} {self.inputs.files[flag]}: has {video.shape[2]} frames at "
                f"{self.fps:g} per second, and --num-frames is {self.window}"
            )
        return video[:, :, : self.window]

    def total(self, given: int, context: int) -> int:
        """Number of frames of the result; by default one window is added."""
        added = given + self.window - context
        return added if self.inputs.total_frames is None else self.inputs.total_frames


@dataclass(frozen=True)
class Task:
    """A task: a function that makes videos, and which of ``TaskInputs`` it needs and may take.

    ``knows_frames`` is set where frames are known to the network. A ``still`` task makes images.
    """

    run: Callable[[Job], Float[Tensor, "b 3 _F H W"]]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    knows_frames: bool = True
    still: bool = False


def check_inputs(name: str, inputs: TaskInputs, sampling: SamplingConfig) -> None:
    """Raise ``ValueError`` for an input that the task lacks or does not use, or a missing file."""
    task = TASKS[name]
    for missing in sorted(set(task.needs) - inputs.given):
        raise ValueError(f"{_flag(missing)} is missing: --task {name} needs it")
    known = {
        "frame_noise": sampling.frame_noise != 0,
        "frame_guidance": sampling.guidance.frame_guidance is not None,
    }
    given = inputs.given | {key for key, is_set in known.items() if is_set}
    for useless in sorted(given - _used(task)):
        users = [other for other in TASKS if useless in _used(TASKS[other])]
        raise ValueError(
            f"{_flag(useless)} has no meaning for --task {name}, only for {', '.join(users)}"
        )
    for flag, path in inputs.files.items():
        require_file(f"--{flag}", path)


def _used(task: Task) -> set[str]:
    of_frames = ("frame_noise", "frame_guidance") if task.knows_frames else ()
    return {*task.needs, *task.takes, *of_frames}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def read_video(flag: str, path: Path, fps: float, size: VideoSize) -> Float[Tensor, "1 3 F H W"]:
    """Read a video at a frame rate, or an image as one frame, scaled and cropped to a size.

    Raises ``ValueError`` naming the flag for frames smaller than the size.
    """
    frames, _ = read_frames(path, fps=fps)
    with naming(f"{flag} {path}:"):
        return fit_frames(torch.from_numpy(frames.copy()), size.height, size.width)[None]


def _text(job: Job) -> Tensor:
    return job.video_generator.videos(job.prompts, job.size, job.seeds)


def _animate(job: Job) -> Tensor:
    image = job.read("video")[:, :, :1]
    return generation.extend(*job.model, image, job.total(1, 1), job.window, context=1)


def _extend(job: Job) -> Tensor:
    video = job.read("video")
    total = job.total(video.shape[2], job.context)
    return generation.extend(*job.model, video, total, job.window, job.context)


def _extend_backward(job: Job) -> Tensor:
    video = job.read("video")
    total = job.total(video.shape[2], job.context)
    return generation.extend_backward(*job.model, video, total, job.window, job.context)


def _connect(job: Job) -> Tensor:
    ends = job.read("video"), job.read("to")
    return generation.connect(*job.model, *ends, job.window, job.context)


def _loop(job: Job) -> Tensor:
    return generation.loop(*job.model, job.read("video"), job.window, job.context)


def _inpaint(job: Job) -> Tensor:
    mask = job.read("mask")
    if mask.shape[2] == 1:
        mask = mask.expand(-1, -1, job.window, -1, -1)
    else:
        mask = job.read_window("mask")
    repaint = mask.mean(1, keepdim=True) > 0
    return generation.inpaint(*job.model, job.read_window("video"), repaint)


def _edit(job: Job) -> Tensor:
    strength, source = job.inputs.strength, job.inputs.source_prompt
    assert strength is not None
    sources = None if source is None else [source] * len(job.prompts)
    return generation.edit(*job.model, job.read_window("video"), strength, sources)


def _instruct(job: Job) -> Tensor:
    return generation.instruct(*job.model, job.read_window("video"))


def _long(job: Job) -> Tensor:
    start = _text(job)
    total = job.total(job.window, job.context)
    # The first window has the seed's own noise; those that follow have other noise.
    later = [seed + (1 << 62) for seed in job.seeds]
    video_generator, prompts, _ = job.model
    return generation.extend(video_generator, prompts, later, start, total, job.window, job.context)


_GROWN = ("frames", "total_frames")
TASKS = {
    "text": Task(_text, knows_frames=False),
    "image": Task(_text, knows_frames=False, still=True),
    "animate": Task(_animate, needs=("video",), takes=("total_frames",)),
    "extend": Task(_extend, needs=("video",), takes=_GROWN),
    "extend-backward": Task(_extend_backward, needs=("video",), takes=_GROWN),
    "connect": Task(_connect, needs=("video", "to"), takes=("frames",)),
    "loop": Task(_loop, needs=("video",), takes=("frames",)),
    "inpaint": Task(_inpaint, needs=("video", "mask")),
    "edit": Task(_edit, needs=("video", "strength"), takes=("source_prompt",), knows_frames=False),
    "instruct": Task(_instruct, needs=("video",)),
    "long": Task(_long, needs=("total_frames",), takes=("frames",)),
}
