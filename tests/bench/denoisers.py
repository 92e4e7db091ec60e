"""Forward, and forward with backward, of the house's denoisers at the sizes of their papers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sora_lightning.denoisers import DiT
from sora_lightning.types import Condition
from tests.bench.report import Report

BATCH, CHANNELS, TEXT_WIDTH = 4, 4, 64


def run(report: Report) -> None:
    for name, width, depth, num_heads in (("DiT-S/2", 384, 12, 6), ("DiT-B/2", 768, 12, 12)):
        dit = DiT(CHANNELS, TEXT_WIDTH, width=width, depth=depth, num_heads=num_heads)
        x = torch.randn(BATCH, CHANNELS, 1, 32, 32)
        text = Condition(
            torch.randn(BATCH, 1, TEXT_WIDTH),
            torch.ones(BATCH, 1, dtype=torch.bool),
            torch.randn(BATCH, TEXT_WIDTH),
        )
        t = torch.rand(BATCH)
        for what, measured in (("forward", forward), ("forward and backward", backward)):
            ours = measured(dit, lambda dit=dit, x=x, t=t, text=text: dit(x, t, text))
            report.compare(f"{name}, 256 tokens, {what}", {"sora_lightning": ours})


def forward(model: nn.Module, call: Callable[[], Tensor]) -> Callable[[], object]:
    """One call without gradients."""
    return torch.no_grad()(call)


def backward(model: nn.Module, call: Callable[[], Tensor]) -> Callable[[], object]:
    """One call, and the gradient of its output's sum to every parameter."""

    def step() -> None:
        model.zero_grad()
        call().sum().backward()

    return step
