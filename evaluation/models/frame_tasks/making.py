"""Sampling of the videos of every task, in batches of one size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from evaluation.inputs import as_batch
from evaluation.models.frame_tasks.cases import Case, Video, turned_round
from sora_lightning import generation
from sora_lightning.generation import VideoGenerator
from sora_lightning.types import VideoSize, as_levels

Pixels = Float[Tensor, "b 3 _F H W"]
_BATCH = 16


@dataclass(frozen=True)
class Windows:
    """Number of frames of a short and of a long window, and of the given context."""

    short: int
    long: int
    context: int


@dataclass(frozen=True)
class Batch:
    """A batch of cases of one size, with the model and a seed for each."""

    video_generator: VideoGenerator
    cases: list[Case]
    seeds: list[int]

    @property
    def model(self) -> tuple[VideoGenerator, list[str], list[int]]:
        return self.video_generator, [case.prompt for case in self.cases], self.seeds

    def videos(self, num_frames: int | None = None) -> Pixels:
        return _pixels([case.video[:num_frames] for case in self.cases], self.device)

    def second_videos(self) -> Pixels:
        return _pixels(
            [case.second_video for case in self.cases if case.second_video is not None], self.device
        )

    @property
    def device(self) -> torch.device:
        return self.video_generator.tokenizer.latent_mean.device

    def size(self, num_frames: int) -> VideoSize:
        return VideoSize(num_frames, *self.cases[0].size)


Make = Callable[[Batch, Windows], Pixels]


def text(batch: Batch, windows: Windows) -> Pixels:
    return batch.video_generator.videos(batch.model[1], batch.size(windows.short), batch.seeds)


def animate(batch: Batch, windows: Windows) -> Pixels:
    size = windows.short
    return generation.extend(*batch.model, batch.videos(1), size, window=size, context=1)


def extend(batch: Batch, windows: Windows) -> Pixels:
    videos = batch.videos(windows.context)
    return generation.extend(*batch.model, videos, windows.short, windows.short, windows.context)


def extend_backward(batch: Batch, windows: Windows) -> Pixels:
    videos = batch.videos()[:, :, -windows.context :]
    size = windows.short
    return generation.extend_backward(*batch.model, videos, size, size, windows.context)


def connect(batch: Batch, windows: Windows) -> Pixels:
    ends = batch.videos(), batch.second_videos()
    return generation.connect(*batch.model, *ends, windows.long, windows.context)


def loop(batch: Batch, windows: Windows) -> Pixels:
    """Loop the given frames; the prompts describe the way back."""
    videos = batch.videos(windows.context)
    return generation.loop(*batch.model, videos, windows.long, windows.context)


def inpaint(batch: Batch, windows: Windows) -> Pixels:
    """Inpaint the left half of the frames after the context."""
    videos = batch.videos(windows.short)
    repaint = torch.zeros_like(videos[:, :1], dtype=torch.bool)
    repaint[:, :, windows.context :, :, : videos.shape[-1] // 2] = True
    return generation.inpaint(*batch.model, videos, repaint)


def edit(strength: float, source_guidance: float) -> Make:
    """Edit by two prompts: a case's ``prompt`` is the target, ``source_prompt`` is of its video."""

    def make(batch: Batch, windows: Windows) -> Pixels:
        videos, sources = batch.videos(windows.short), [case.source_prompt for case in batch.cases]
        return generation.edit(*batch.model, videos, strength, sources, source_guidance)

    return make


def sdedit(strength: float) -> Make:
    """Edit by noise and the target prompt alone (SDEdit)."""

    def make(batch: Batch, windows: Windows) -> Pixels:
        return generation.edit(*batch.model, batch.videos(windows.short), strength)

    return make


def long(times: int, context_noise: float) -> Make:
    """Sample a video of ``times`` windows, each window continuing from the end of the previous one.

    The context is conditioned on at diffusion time ``context_noise``. The prompts reverse the
    direction before the shape would leave the image.
    """

    def make(batch: Batch, windows: Windows) -> Pixels:
        video_generator, prompts, seeds = batch.model
        back = [turned_round(case).prompt for case in batch.cases]
        video, step = text(batch, windows), windows.short - windows.context
        noisy = replace(
            video_generator, sampling=replace(video_generator.sampling, frame_noise=context_noise)
        )
        # A shape stays inside the image for two seconds, the new frames of two windows.
        for number in range(-(-(times - 1) * windows.short // step)):
            video = generation.extend(
                noisy,
                back if number % 4 < 2 else prompts,
                [seed + (number + 1 << 40) for seed in seeds],
                video,
                video.shape[2] + step,
                windows.short,
                windows.context,
            )
        return video[:, :, : times * windows.short]

    return make


def reconstructed(frames: int | None) -> Make:
    """Reconstruct the first ``frames`` frames with the tokenizer alone."""

    def make(batch: Batch, windows: Windows) -> Pixels:
        tokenizer = batch.video_generator.tokenizer
        return tokenizer.decode(tokenizer.encode(batch.videos(frames)))

    return make


@torch.no_grad()
def make_videos(
    task: str, make: Make, video_generator: VideoGenerator, cases: Sequence[Case], windows: Windows
) -> list[Video]:
    """Sample a video for each case, in their order; case i has seed i."""
    made: dict[int, Video] = {}
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, case in enumerate(cases):
        by_size.setdefault(case.size, []).append(index)
    with tqdm(total=len(cases), desc=task, unit="video") as bar:
        for indices in by_size.values():
            for start in range(0, len(indices), _BATCH):
                chosen = indices[start : start + _BATCH]
                batch = Batch(video_generator, [cases[i] for i in chosen], chosen)
                videos = rearrange(as_levels(make(batch, windows).cpu()), "b c F H W -> b F H W c")
                made |= zip(chosen, videos.numpy(), strict=True)
                bar.update(len(chosen))
    return [made[i] for i in range(len(cases))]


def _pixels(videos: Sequence[Video], device: torch.device) -> Pixels:
    return as_batch([np.ascontiguousarray(v) for v in videos]).to(device).float() / 127.5 - 1
