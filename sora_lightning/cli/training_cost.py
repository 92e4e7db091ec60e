"""Cost of a training step before the training starts: parameters and FLOPs, counted on the meta
device, where weights take no memory, and seconds, measured on a step of the smallest size.
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from sora_lightning.checkpoints import build
from sora_lightning.cli.training import TrainingCLI, run_training
from sora_lightning.data import VideoDataModule
from sora_lightning.data.batching.buckets import num_pixels
from sora_lightning.denoisers import Denoiser, DiT
from sora_lightning.denoisers.pretrained_base import PretrainedDenoiser
from sora_lightning.flops import FlopCounter
from sora_lightning.live_memory import (
    LiveMemory,
    cuda_autocast,
    fused_attention,
    without_gradients,
)
from sora_lightning.systems import DiffusionSystem, TokenizerSystem
from sora_lightning.types import Condition, VideoSize

_NUM_WORDS = 16
_SECONDS = 10.0  # what is measured takes no longer, if one clip does not


@dataclass(frozen=True)
class Training:
    """A training that ``fit`` accepts: its model as in a YAML and built on the meta device, its
    data, and its trainer."""

    model: dict[str, Any]
    system: LightningModule
    data: VideoDataModule
    trainer: Trainer

    @property
    def max_steps(self) -> int:
        return int(self.trainer.max_steps)

    def with_model(self, model: dict[str, Any]) -> Training:
        """Return the training with another model. Raises ``ValueError`` if it cannot be built."""
        with on_meta():
            system = build(LightningModule, model, "the model")
        return replace(self, model=model, system=system)


class StepCost(NamedTuple):
    """Clips of one size in a step, and the FLOPs of its forward and backward passes on a device,
    without frozen parts, optimizer and text encoder.
    """

    size: VideoSize
    num_clips: int
    flops: int


class _MetaCLI(TrainingCLI):
    """Parses and checks a configuration as ``fit`` does, builds it on the meta device without its
    callbacks, which may read weights, and stops there."""

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        self.config[self.subcommand].trainer.callbacks = None

    def instantiate_classes(self) -> None:
        with on_meta():
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
    return Training(model, cli.model, cli.datamodule, cli.trainer)


def num_parameters(training: Training) -> int:
    """Return the number of parameters that train."""
    return sum(p.numel() for p in training.system.parameters() if p.requires_grad)


def step_costs(training: Training) -> list[StepCost]:
    """Count the FLOPs of a step of each size. Packs are counted as if all clips were the largest.

    Raises ``ValueError`` for another system than those of this package.
    """
    costs = []
    for size, num_clips in step_sizes(training.data):
        with FlopCounter() as counter:
            _forward(training.system, size, num_clips).sum().backward()
        costs.append(StepCost(size, num_clips, counter.total))
    return costs


def step_flops(training: Training) -> float:
    """Return the mean FLOPs of a step over its sizes. Raises as ``step_costs``."""
    costs = step_costs(training)
    return sum(cost.flops for cost in costs) / len(costs)


def flops_per_s(training: Training, costs: list[StepCost]) -> float:
    """Return the speed of the trainer's device: measured on a step of the cheapest size, or on a
    single clip of it where a step would take long.
    """
    system = build(LightningModule, training.model, "the model")
    system = system.to(training.trainer.strategy.root_device)
    cheapest = min(costs, key=lambda cost: cost.flops)
    _seconds(training, system, cheapest.size, 1)  # the first allocates
    seconds = _seconds(training, system, cheapest.size, 1)
    if seconds * cheapest.num_clips > _SECONDS:
        return cheapest.flops / cheapest.num_clips / seconds
    return cheapest.flops / _seconds(training, system, cheapest.size, cheapest.num_clips)


def _seconds(training: Training, system: LightningModule, size: VideoSize, num_clips: int) -> float:
    begun_s = time.perf_counter()
    with training.trainer.precision_plugin.forward_context():
        loss = _forward(system, size, num_clips).sum()
    loss.backward()
    loss.item()  # waits for a GPU
    return time.perf_counter() - begun_s


def state_bytes(system: LightningModule) -> int:
    """Return the bytes of weights, and of gradients, two moments and an average of those that
    train.
    """
    return sum(p.nbytes * (5 if p.requires_grad else 1) for p in system.parameters())


def autocast_dtype(trainer: Trainer) -> torch.dtype:
    """Return the type of a trainer's mixed precision, float32 for every other precision."""
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return mixed.get(trainer.precision, torch.float32)


def device_bytes(device: torch.device) -> int:
    """Return the memory of a device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def step_sizes(data: VideoDataModule) -> list[tuple[VideoSize, int]]:
    """Return the sizes of batches, and the number of clips in each."""
    packing = data.packing
    if packing is None:
        pixels = data.batching.pixels_per_batch
        assert pixels is not None
        return [(size, pixels // num_pixels(size)) for size in data.sizes.sizes]
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


def _forward(system: LightningModule, size: VideoSize, num_clips: int) -> Tensor:
    """Return the losses, or the reconstruction, of ``num_clips`` clips of zeros."""
    if isinstance(system, TokenizerSystem):
        device = next(system.parameters()).device
        video = torch.zeros(num_clips, 3, size.num_frames, size.height, size.width, device=device)
        return system.tokenizer.decode_raw(system.tokenizer.posterior(video).mean)
    if isinstance(system, DiffusionSystem):
        return losses_of_zeros(system, size, num_clips)
    raise ValueError(f"{type(system).__name__}: FLOPs of other systems are not counted")


def losses_of_zeros(system: DiffusionSystem, size: VideoSize, num_clips: int) -> Tensor:
    """Return the losses of clips of zeros."""
    device = next(system.denoiser.parameters()).device
    grid = system.tokenizer.compression.grid(size)
    shape = num_clips, system.tokenizer.latent_channels, grid.f, grid.h, grid.w
    x_0, t = torch.zeros(shape, device=device), torch.zeros(num_clips, device=device)
    condition = condition_of_zeros(system, num_clips)
    return system.objective(system.network(), x_0, x_0, t, condition)


def condition_of_zeros(system: DiffusionSystem, num_clips: int) -> Condition:
    """Return a condition of 16 tokens and a pooled vector for each clip, of the denoiser's type."""
    weight = next(system.denoiser.parameters())
    zeros = partial(torch.zeros, dtype=weight.dtype, device=weight.device)
    mask = torch.ones(num_clips, _NUM_WORDS, dtype=torch.bool, device=weight.device)
    tokens = zeros(num_clips, _NUM_WORDS, system.conditioner.width)
    return Condition(tokens, mask, zeros(num_clips, system.conditioner.pooled_width))


def activations_of_clip(
    system: LightningModule, size: VideoSize, dtype: torch.dtype = torch.float32
) -> float:
    """Return the bytes of a clip's activations at the peak of its forward and backward passes, with
    fused attention, under autocast to ``dtype``. ``system`` is on the meta device.

    Raises ``ValueError`` for another system than those of this package.
    """
    with LiveMemory() as memory, fused_attention(), cuda_autocast(dtype), without_gradients(system):
        _forward(system, size, 1).sum().backward()
    return float(memory.peak)


def set_checkpointing(denoiser: Denoiser, on: bool) -> bool:
    """Switch activation checkpointing on or off. Return False for a network that has none."""
    if isinstance(denoiser, DiT):
        denoiser.activation_checkpointing = on
        return True
    if not isinstance(denoiser, PretrainedDenoiser) or not denoiser.has_checkpointing:
        return False
    network = denoiser.network
    (network.enable_gradient_checkpointing if on else network.disable_gradient_checkpointing)()
    return True


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules on the meta device, without the warnings that this brings."""
    with torch.device("meta"), warnings.catch_warnings():
        # Of a checkpoint's weights, and of parts among a system's hyperparameters.
        warnings.filterwarnings("ignore", ".*(meta parameter|saved during checkpointing).*")
        yield
