"""Parameters and FLOPs of a training, counted on the meta device, where weights take no memory."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sora_lightning.checkpoints import build
from sora_lightning.cli.training import TrainingCLI, run_training
from sora_lightning.data import VideoDataModule
from sora_lightning.denoisers import DiT
from sora_lightning.diffusion import with_own_estimate
from sora_lightning.layers.attention_distance import attended_share, average_attention_distance
from sora_lightning.layers.patch import Patch
from sora_lightning.systems import DiffusionSystem, TokenizerSystem
from sora_lightning.types import Condition, TokenGrid, VideoSize

_NUM_WORDS = 16


@dataclass(frozen=True)
class Training:
    """A training that ``fit`` accepts: its model as in a YAML and built on the meta device, its
    data, and its number of steps."""

    model: dict[str, Any]
    system: LightningModule
    data: VideoDataModule
    max_steps: int

    def with_model(self, model: dict[str, Any]) -> Training:
        """Return the training with another model. Raises ``ValueError`` if it cannot be built."""
        with _on_meta():
            system = build(LightningModule, model, "the model")
        return replace(self, model=model, system=system)


@dataclass(frozen=True)
class Cost:
    """Trained parameters and FLOPs of a training step; for a DiT also its attention.

    FLOPs are those of forward and backward passes over one batch on each device, without frozen
    parts, optimizer and text encoder; of batches of several sizes the mean. Packs are counted as if
    all clips were the largest. ``attention_distance`` and ``attended_share`` are those of
    ``layers.attention_distance`` on the first size.
    """

    parameters: int
    flops: float
    tokens: int
    attention_distance: float | None = None
    attended_share: float | None = None


class _MetaCLI(TrainingCLI):
    """Parses and checks a configuration as ``fit`` does, builds it on the meta device, and stops
    there."""

    def instantiate_classes(self) -> None:
        with _on_meta():
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def build_training(arguments: list[str]) -> Training:
    """Build what ``fit`` would train with these arguments. Raises what ``fit`` raises."""
    logging.disable(logging.INFO)  # which seed was set, and which devices are there
    try:
        cli = run_training(["fit", *arguments], _MetaCLI)
    finally:
        logging.disable(logging.NOTSET)
    model = cli.config["fit"].model.as_dict()
    return Training(model, cli.model, cli.datamodule, int(cli.trainer.max_steps))


def num_parameters(training: Training) -> int:
    """Return the number of parameters that train."""
    return sum(p.numel() for p in training.system.parameters() if p.requires_grad)


def step_flops(training: Training) -> float:
    """Count the FLOPs of a step, as ``Cost`` defines them.

    Raises ``ValueError`` for another system than those of this package.
    """
    system, counts = training.system, []
    for size, num_clips in _batches(training.data):
        if isinstance(system, TokenizerSystem):
            forward = partial(_reconstruct, system, size, num_clips)
        elif isinstance(system, DiffusionSystem):
            forward = partial(_diffuse, system, size, num_clips)
        else:
            raise ValueError(f"{type(system).__name__}: FLOPs of other systems are not counted")
        with FlopCounterMode(display=False) as counter:
            forward().sum().backward()
        counts.append(counter.get_total_flops())
    return sum(counts) / len(counts)


def cost_of(training: Training) -> Cost:
    """Return parameters, FLOPs and attention of a training. Raises as ``step_flops``."""
    batches, system = _batches(training.data), training.system
    grids = [_token_grid(system, size) for size, _ in batches]
    tokens = sum(g.num_tokens * n for g, (_, n) in zip(grids, batches, strict=True))
    cost = Cost(num_parameters(training), step_flops(training), round(tokens / len(batches)))
    if not (isinstance(system, DiffusionSystem) and isinstance(system.denoiser, DiT)):
        return cost
    blocks: Any = system.denoiser.blocks
    schedule = [tuple(one.partition for one in block.attentions) for block in blocks]
    return replace(
        cost,
        attention_distance=average_attention_distance(schedule, grids[0]),
        attended_share=attended_share(schedule, grids[0]),
    )


def _token_grid(system: Any, size: VideoSize) -> TokenGrid:
    grid = system.tokenizer.compression.grid(size)
    patch = system.denoiser.patch if isinstance(system, DiffusionSystem) else Patch()
    return patch.grid(grid.f, grid.h, grid.w)


def _batches(data: VideoDataModule) -> list[tuple[VideoSize, int]]:
    """Return the sizes of batches, and the number of clips in each."""
    packing = data.packing
    if packing is None:
        pixels = data.batching.pixels_per_batch
        assert pixels is not None
        volumes = [(s, s.num_frames * s.height * s.width) for s in data.sizes.sizes]
        return [(size, pixels // volume) for size, volume in volumes]
    token = packing.pixels_per_token
    rows = math.isqrt(packing.max_pixels // (token.height * token.width))
    compression, patch = packing.geometry
    frames = 1 + (packing.max_frames - 1) // compression.frames
    frames = frames // patch.f * patch.f
    largest = VideoSize(
        1 + (frames - 1) * compression.frames, rows * token.height, rows * token.width
    )
    num_tokens = frames // patch.f * rows * rows
    return [(largest, packing.tokens // num_tokens)]


def _diffuse(system: DiffusionSystem, size: VideoSize, num_clips: int) -> Tensor:
    grid = system.tokenizer.compression.grid(size)
    x_0 = _zeros(num_clips, system.tokenizer.latent_channels, grid.f, grid.h, grid.w)
    width = system.conditioner.width
    mask = torch.ones(num_clips, _NUM_WORDS, dtype=torch.bool, device="meta")
    tokens, pooled = _zeros(num_clips, _NUM_WORDS, width), _zeros(num_clips, width)
    objective, denoiser, t = system.objective, system.denoiser, _zeros(num_clips)
    network: Callable[..., Any] = denoiser
    if objective.self_conditioning:
        network = with_own_estimate(denoiser, objective.process, denoiser.patch, t > 0)
    return objective(network, x_0, x_0, t, Condition(tokens, mask, pooled))


def _reconstruct(system: TokenizerSystem, size: VideoSize, num_clips: int) -> Tensor:
    video = _zeros(num_clips, 3, size.num_frames, size.height, size.width)
    return system.tokenizer.decode_raw(system.tokenizer.posterior(video).mean)


def _zeros(*size: int) -> Tensor:
    return torch.zeros(size, device="meta")


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*meta parameter.*")  # a checkpoint's weights
        yield
