"""The planner's estimates against measured seconds and bytes, on the machine at hand.

Each part of a training first runs on clips of half the height and width. Its FLOPs a second there,
and the FLOPs that are counted for whole clips, predict its seconds on those, which are then
measured as well.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sora_lightning.cli.training_cost import condition_of_zeros, losses_of_zeros, on_meta
from sora_lightning.data.batching.buckets import num_pixels
from sora_lightning.live_memory import LiveMemory, without_gradients
from sora_lightning.planner.counting import Count, count
from sora_lightning.planner.plan import build_system
from sora_lightning.systems import DiffusionSystem
from sora_lightning.systems.optimizers import optimizer_of
from sora_lightning.types import VideoSize

_REPEATS = 5


@dataclass(frozen=True)
class Comparison:
    """Seconds of a part, or bytes of its activations, as predicted and as measured."""

    part: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1


def calibrate(
    model: dict[str, Any], size: VideoSize, num_clips: int, source: Path
) -> list[Comparison]:
    """Compare estimate and measurement for a batch of clips of a YAML's ``model``, in float32 on
    the CPU, or under autocast to bfloat16 on a GPU if there is one.

    Raises ``ValueError`` naming ``source`` for a model that cannot be built, and for a size that
    has no half.
    """
    with on_meta():
        counted = build_system(model, source)
    half = _half(size, counted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*saved during checkpointing.*")
        system = build_system(model, source)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    system = system.to(_device())
    num_halves = round(num_clips * num_pixels(size) / num_pixels(half))
    whole_count, half_count = (count(counted, one, dtype) for one in (size, half))
    calls = _calls(system, size, num_clips)
    halves = _calls(system, half, num_halves)
    rows = []
    flops = zip(_flops(half_count), _flops(whole_count), strict=True)
    for part, (half_flops, whole_flops) in zip(calls, flops, strict=True):
        half_s, whole_s = _seconds(halves[part], calls[part])
        speed = half_flops * num_halves / half_s
        rows.append(Comparison(part, whole_flops * num_clips / speed, whole_s))
    with LiveMemory() as memory, without_gradients(system.denoiser), _precision():
        calls["forward and backward"]()
    activations = whole_count.activations * num_clips
    return [*rows, Comparison("activations", activations, float(memory.peak))]


def _calls(
    system: DiffusionSystem, size: VideoSize, num_clips: int
) -> dict[str, Callable[[], Any]]:
    """Return the parts of a training, in the order of ``_flops``."""
    denoiser, tokenizer = system.denoiser, system.tokenizer
    zeros = partial(torch.zeros, device=_device())
    grid = tokenizer.compression.grid(size)
    x_t = zeros(num_clips, tokenizer.latent_channels, grid.f, grid.h, grid.w)
    frames = zeros(num_clips, 3, size.num_frames, size.height, size.width)
    t = zeros(num_clips)
    condition = condition_of_zeros(system, num_clips)
    optimizer = optimizer_of(system.optimizer, system)

    def step() -> None:
        losses_of_zeros(system, size, num_clips).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {
        "forward": torch.no_grad()(lambda: denoiser(x_t, t, condition)),
        "forward and backward": lambda: denoiser(x_t, t, condition).sum().backward(),
        "whole step": step,
        "tokenizer encode": torch.no_grad()(lambda: tokenizer.posterior(frames).mean),
        "tokenizer decode": torch.no_grad()(lambda: tokenizer.decode_raw(x_t)),
    }


def _flops(cost: Count) -> tuple[float, ...]:
    both = cost.forward_flops + cost.backward_flops
    return cost.forward_flops, both, both, cost.encode_flops, cost.decode_flops


def _seconds(*calls: Callable[[], Any]) -> list[float]:
    """Return the median of five repeats of each call, after one that allocates. The calls take
    turns, so that a machine that grows faster or slower does so for all.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(1 + _REPEATS):
        for call, own in zip(calls, seconds, strict=True):
            _wait()
            begun_s = time.perf_counter()
            with _precision():
                call()
            _wait()
            if repeat > 0:
                own.append(time.perf_counter() - begun_s)
    return [statistics.median(own) for own in seconds]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _precision() -> torch.autocast:
    return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available())


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _half(size: VideoSize, system: DiffusionSystem) -> VideoSize:
    compression, patch = system.tokenizer.compression, system.denoiser.patch
    sides = [
        (size.height, compression.height * patch.h),
        (size.width, compression.width * patch.w),
    ]
    height, width = (max(1, side // unit // 2) * unit for side, unit in sides)
    if (height, width) == (size.height, size.width):
        raise ValueError(f"{size}: has one row and one column of tokens, and no half to measure")
    return VideoSize(size.num_frames, height, width)
