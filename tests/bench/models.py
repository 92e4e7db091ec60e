"""Networks of the papers' sizes on random latents, and their cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sora_lightning.types import Condition
from tests.bench.report import Report

CHANNELS = 4


def latents(batch: int, frames: int, side: int) -> tuple[Tensor, Tensor]:
    """Noisy latents and their times."""
    return torch.randn(batch, CHANNELS, frames, side, side), torch.rand(batch)


def condition(batch: int, width: int) -> Condition:
    """One token of random text, which is the pooled vector too."""
    pooled = torch.randn(batch, width)
    return Condition(pooled[:, None], torch.ones(batch, 1, dtype=torch.bool), pooled)


def forward_gmac(make: Callable[[], nn.Module], extent: Sequence[int], width: int) -> float:
    """Billions of multiply-accumulates of one clip of frames, rows and columns of latents, counted
    on the meta device.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        make()(torch.empty(1, CHANNELS, *extent), torch.empty(1), condition(1, width))
    return counter.get_total_flops() / 2e9


def forward(call: Callable[[], Tensor]) -> Callable[[], object]:
    """One call without gradients."""
    return torch.no_grad()(call)


def backward(model: nn.Module, call: Callable[[], Tensor]) -> Callable[[], object]:
    """One call, and the gradient of its output's sum to every parameter."""

    def step() -> None:
        model.zero_grad()
        call().sum().backward()

    return step


def compare_passes(
    report: Report,
    case: str,
    models: Mapping[str, tuple[nn.Module, Callable[[], Tensor]]],
    gmac: float | None,
    **items: Any,
) -> None:
    """Compare networks forward, and forward with backward. ``gmac`` is that of a forward pass."""
    for what, times in (("forward", 1), ("forward and backward", 3)):
        report.compare(
            f"{case}, {what}",
            {
                name: forward(call) if times == 1 else backward(model, call)
                for name, (model, call) in models.items()
            },
            gmac=None if gmac is None else dict.fromkeys(models, times * gmac),
            **items,
        )
