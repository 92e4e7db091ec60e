"""What `sample --task` does with videos: which arguments each task takes, and how it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sora_lightning import generation
from sora_lightning.data.batching.buckets import fit_frames
from sora_lightning.data.decoding.readers import PyAVReader, read_timeline
from sora_lightning.diffusion import DDIM, DDPM, Sampler, UniPC, dpm_solver, euler, heun
from sora_lightning.generation import VideoGenerator
from sora_lightning.types import VideoSize

TaskName = Literal[
    "text",
    "image",
    "animate",
    "extend",
    "extend-backward",
    "connect",
    "loop",
    "inpaint",
    "edit",
    "instruct",
    "long",
]
SamplerName = Literal["euler", "heun", "ddim", "ddpm", "dpm-solver", "unipc"]
SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "heun": heun,
    "ddim": DDIM(),
    "ddpm": DDPM(),
    "dpm-solver": dpm_solver,
    "unipc": UniPC(),
}
PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class FrameArguments:
    """The arguments of `sample` that only some tasks take; ``None`` where they were not given."""

    video: Path | None = None
    to: Path | None = None
    mask: Path | None = None
    frames: int | None = None
    total_frames: int | None = None
    strength: float | None = None
    frame_noise: float | None = None
    frame_guidance: float | None = None
    source_prompt: str | None = None

    def given(self) -> set[str]:
        return {one.name for one in fields(self) if getattr(self, one.name) is not None}


@dataclass(frozen=True)
class Request:
    """A task with all that it takes: tensors of one clip, and numbers of frames."""

    generator: VideoGenerator
    prompt: str
    seed: int
    size: VideoSize
    fps: float
    arguments: FrameArguments

    @property
    def model(self) -> tuple[VideoGenerator, list[str], list[int]]:
        return self.generator, [self.prompt], [self.seed]

    @property
    def window(self) -> int:
        return self.size.num_frames

    @property
    def context(self) -> int:
        """Two latent frames unless another number of frames is asked for."""
        default = 1 + self.generator.tokenizer.compression.frames
        return default if self.arguments.frames is None else self.arguments.frames

    @property
    def noise(self) -> float:
        return self.arguments.frame_noise or 0.0

    def read(self, name: str) -> Float[Tensor, "1 3 F H W"]:
        """The video that an argument names, at the model's rate and in the size asked for."""
        path = getattr(self.arguments, name)
        assert path is not None
        return read_video(f"--{name}", path, self.fps, self.size)

    def total(self, given: int, context: int) -> int:
        """The frames of the result: as asked for, else those that one window adds."""
        if self.arguments.total_frames is not None:
            return self.arguments.total_frames
        return given + self.window - context


@dataclass(frozen=True)
class Task:
    """Which of ``FrameArguments`` a task must have and may have."""

    run: Callable[[Request], Tensor]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


def check_arguments(name: str, arguments: FrameArguments) -> None:
    """Raise ``ValueError`` for an argument that the task lacks or has no use for, and for a file
    that is not there.
    """
    task, given = TASKS[name], arguments.given()
    for missing in sorted(set(task.needs) - given):
        raise ValueError(f"{_flag(missing)} is missing: --task {name} needs it")
    for useless in sorted(given - {*task.needs, *task.takes}):
        users = [other for other in TASKS if useless in (*TASKS[other].needs, *TASKS[other].takes)]
        raise ValueError(
            f"{_flag(useless)} has no meaning for --task {name}, only for {', '.join(users)}"
        )
    for role in sorted(given & {"video", "to", "mask"}):
        path = getattr(arguments, role)
        if not path.is_file():
            raise ValueError(f"{_flag(role)} {path}: no such file")


@torch.no_grad()
def run_task(name: str, request: Request) -> Float[Tensor, "3 _F H W"]:
    """The video that a task makes, in [-1, 1]."""
    return TASKS[name].run(request)[0]


def _text(request: Request) -> Tensor:
    generator, prompts, seeds = request.model
    return generator.videos(prompts, request.size, seeds)


def _animate(request: Request) -> Tensor:
    image = request.read("video")[:, :, :1]
    total = request.total(1, 1)
    return generation.extend(
        *request.model, image, total, window=request.window, context=1, noise=request.noise
    )


def _extend(request: Request) -> Tensor:
    video = request.read("video")
    total = request.total(video.shape[2], request.context)
    return generation.extend(
        *request.model, video, total, request.window, request.context, request.noise
    )


def _extend_backward(request: Request) -> Tensor:
    video = request.read("video")
    total = request.total(video.shape[2], request.context)
    return generation.extend_backward(
        *request.model, video, total, request.window, request.context, request.noise
    )


def _connect(request: Request) -> Tensor:
    first, second = request.read("video"), request.read("to")
    return generation.connect(
        *request.model, first, second, request.window, request.context, request.noise
    )


def _loop(request: Request) -> Tensor:
    video = request.read("video")
    return generation.loop(*request.model, video, request.window, request.context, request.noise)


def _inpaint(request: Request) -> Tensor:
    video = _first(request, "video")
    repaint = _first(request, "mask").mean(1, keepdim=True) > 0
    return generation.inpaint(*request.model, video, repaint, request.noise)


def _edit(request: Request) -> Tensor:
    arguments = request.arguments
    assert arguments.strength is not None
    sources = None if arguments.source_prompt is None else [arguments.source_prompt]
    video = _first(request, "video")
    return generation.edit(*request.model, video, arguments.strength, sources)


def _instruct(request: Request) -> Tensor:
    return generation.instruct(*request.model, _first(request, "video"), request.noise)


def _long(request: Request) -> Tensor:
    generator, prompts, seeds = request.model
    start = generator.videos(prompts, request.size, seeds)
    total = request.total(request.window, request.context)
    # The first window of the seed's noise is taken; those that follow have their own.
    later = [seed + (1 << 62) for seed in seeds]
    return generation.extend(
        generator, prompts, later, start, total, request.window, request.context, request.noise
    )


_HELD = ("frame_noise", "frame_guidance")
_GROWN = ("frames", "total_frames", *_HELD)
TASKS = {
    "text": Task(_text),
    "image": Task(_text),
    "animate": Task(_animate, needs=("video",), takes=("total_frames", *_HELD)),
    "extend": Task(_extend, needs=("video",), takes=_GROWN),
    "extend-backward": Task(_extend_backward, needs=("video",), takes=_GROWN),
    "connect": Task(_connect, needs=("video", "to"), takes=("frames", *_HELD)),
    "loop": Task(_loop, needs=("video",), takes=("frames", *_HELD)),
    "inpaint": Task(_inpaint, needs=("video", "mask"), takes=_HELD),
    "edit": Task(_edit, needs=("video", "strength"), takes=("source_prompt",)),
    "instruct": Task(_instruct, needs=("video",), takes=_HELD),
    "long": Task(_long, needs=("total_frames",), takes=("frames", *_HELD)),
}


def _first(request: Request, name: str) -> Float[Tensor, "1 3 F H W"]:
    """As many frames of a video as are made. ``ValueError`` where it is shorter."""
    video = request.read(name)
    if video.shape[2] < request.window:
        raise ValueError(
            f"--{name} {getattr(request.arguments, name)}: has {video.shape[2]} frames at "
            f"{request.fps:g} per second, and --num-frames is {request.window}"
        )
    return video[:, :, : request.window]


def read_video(flag: str, path: Path, fps: float, size: VideoSize) -> Float[Tensor, "1 3 F H W"]:
    """A video's frames at a rate, or a picture as one frame, scaled and cropped to a size."""
    if path.suffix.lower() in PICTURES:
        frames = np.asarray(Image.open(path).convert("RGB"))[None]
    else:
        timeline = read_timeline(path)
        indices = timeline.shown_at(np.arange(max(1, round(timeline.end_s * fps))) / fps)
        frames = PyAVReader().read(path, timeline, indices.tolist())
    try:
        return fit_frames(torch.from_numpy(frames.copy()), size.height, size.width)[None]
    except ValueError as error:
        raise ValueError(f"{flag} {path}: {error}") from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
