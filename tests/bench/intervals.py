"""The jackknife of a Fréchet and of a kernel distance: parts by one pass over the features, and by
sets cut anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from evaluation.metrics import frechet_distance, kernel_distance
from evaluation.metrics.frechet import jackknife_interval
from evaluation.metrics.kernel import kernel_distances_without_each_group

if TYPE_CHECKING:
    from tests.bench.report import Report

ROWS, WIDTH, GROUPS = 4096, 512, 16


def run(report: Report) -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(ROWS, WIDTH, generator=draw, dtype=torch.float64) for _ in range(2))

    def plain(one: Float[Tensor, "n d"], two: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
        return frechet_distance(one, two)

    def of_kernel(quick: bool) -> tuple[float, float]:
        parts = kernel_distances_without_each_group if quick else None
        return jackknife_interval(x, y, GROUPS, distance=kernel_distance, parts=parts)

    shape = f"2 x {ROWS} rows of {WIDTH} features, {GROUPS} groups"
    for case, candidates in (
        (
            f"interval of the Fréchet distance, {shape}",
            {
                "cut anew": lambda: jackknife_interval(x, y, GROUPS, distance=plain),
                "one pass": lambda: jackknife_interval(x, y, GROUPS),
            },
        ),
        (
            f"interval of the kernel distance, {shape}",
            {"cut anew": lambda: of_kernel(False), "one pass": lambda: of_kernel(True)},
        ),
    ):
        rounds = 1 if "kernel" in case else None  # cut anew, it takes ten seconds
        report.compare(case, candidates, items=GROUPS, unit="groups", rounds=rounds)
