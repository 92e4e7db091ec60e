"""FLOPs, parameters and live memory of a diffusion system, counted on the meta device.

Attention is counted as the fused kernel that a GPU runs: FLOPs of its two matrix products, and no
matrix of scores in memory. Types are those of mixed precision, where norms are in float32. FLOPs of
the backward pass are twice those of the forward pass, without what the kernel computes again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from sora_lightning.cli.training_cost import condition_of_zeros, set_checkpointing
from sora_lightning.flops import FlopCounter
from sora_lightning.live_memory import (
    LiveMemory,
    cuda_autocast,
    fused_attention,
    without_gradients,
)
from sora_lightning.systems import DiffusionSystem
from sora_lightning.types import VideoSize


@dataclass(frozen=True)
class Count:
    """Cost of one clip; FLOPs are twice the multiply-accumulates, memory is in bytes.

    ``trained`` is the number of the denoiser's parameters that train, such as adapters'.
    ``activations`` is the peak of the denoiser's forward and backward passes beside
    weights, their casts and gradients, without activation checkpointing, and ``checkpointed`` with
    it; both are equal for a network that has none. ``working_set`` is the peak of a forward pass
    without gradients.
    """

    tokens: int
    parameters: int
    trained: int
    tokenizer_parameters: int
    conditioner_parameters: int
    encode_flops: float
    decode_flops: float
    forward_flops: float
    backward_flops: float
    working_set: float
    activations: float
    checkpointed: float


def count(system: DiffusionSystem, size: VideoSize, dtype: torch.dtype = torch.bfloat16) -> Count:
    """Count one clip of ``size`` under autocast to ``dtype``. ``system`` is built on the meta
    device; its activation checkpointing is switched off.

    The text encoder's FLOPs are left out.

    Raises ``ValueError`` for a size that tokenizer and patches do not divide.
    """
    tokenizer, denoiser = system.tokenizer, system.denoiser
    grid = tokenizer.compression.grid(size)
    tokens = denoiser.patch.grid(grid.f, grid.h, grid.w).num_tokens
    zeros = partial(torch.zeros, device="meta")
    x_t = zeros(1, tokenizer.latent_channels, grid.f, grid.h, grid.w)
    frames = zeros(1, 3, size.num_frames, size.height, size.width)
    condition = condition_of_zeros(system, 1)

    def step() -> None:
        denoiser(x_t, zeros(1), condition).sum().backward()

    measured = partial(_measured, dtype)
    with without_gradients(denoiser):
        can_recompute = set_checkpointing(denoiser, True)
        _, checkpointed = measured(step) if can_recompute else (0.0, 0.0)
        set_checkpointing(denoiser, False)
        both, activations = measured(step)
    with torch.no_grad():
        encode, _ = measured(lambda: tokenizer.posterior(frames).mean)
        decode, _ = measured(lambda: tokenizer.decode_raw(x_t))
        forward, working_set = measured(lambda: denoiser(x_t, zeros(1), condition))
    return Count(
        tokens=tokens,
        parameters=_num_parameters(denoiser),
        trained=sum(p.numel() for p in denoiser.parameters() if p.requires_grad),
        tokenizer_parameters=_num_parameters(tokenizer),
        conditioner_parameters=_num_parameters(system.conditioner),
        encode_flops=encode,
        decode_flops=decode,
        forward_flops=forward,
        backward_flops=both - forward,
        working_set=working_set,
        activations=activations,
        checkpointed=checkpointed if can_recompute else activations,
    )


def _measured(dtype: torch.dtype, call: Callable[[], Any]) -> tuple[float, float]:
    """Return the FLOPs of a call, and the peak of the memory that it allocates."""
    with FlopCounter() as counter, LiveMemory() as memory, fused_attention(), cuda_autocast(dtype):
        call()
    return float(counter.total), float(memory.peak)


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
