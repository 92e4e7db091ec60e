"""Kernel distances between two sets of features: unbiased squared MMD, in float64.

With features of videos this is KVD, with features of frames KID (Bińkowski et al., 2018).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from evaluation.metrics.frechet import checked_pair

Kernel = Callable[[Float[Tensor, "n d"], Float[Tensor, "m d"]], Float[Tensor, "n m"]]


def cubic(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """(x · y / d + 1)³, the kernel of KID."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(
    first: Float[Tensor, "n d"], second: Float[Tensor, "m d"], kernel: Kernel = cubic
) -> Float[Tensor, ""]:
    """Unbiased estimate (U-statistic) of the squared maximum mean discrepancy.

    Its expectation is 0 for two sets from one distribution, whatever their sizes, so it may be
    negative. Raises ``ValueError`` for different widths, fewer than two videos, or values that are
    not finite.
    """
    x, y = checked_pair(first, second, least=2)
    return _within(kernel(x, x)) + _within(kernel(y, y)) - 2 * kernel(x, y).mean()


def kernel_distances_without_each_group(
    first: Float[Tensor, "n d"],
    second: Float[Tensor, "m d"],
    groups: tuple[Int[Tensor, " n"], Int[Tensor, " m"]],
    num_groups: int,
    kernel: Kernel = cubic,
) -> Float[Tensor, " num_groups"]:
    """Return ``kernel_distance`` without each group of both sets in turn.

    Sums over pairs of groups are computed once, so the cost is about that of a single distance.
    """
    x, y = checked_pair(first, second, least=2)
    of_x, of_y = (
        [z[of == g] for g in range(num_groups)] for z, of in zip((x, y), groups, strict=True)
    )
    within_x, within_y = (
        torch.stack([torch.stack([kernel(a, b).sum() for b in of]) for a in of])
        for of in (of_x, of_y)
    )
    between = torch.stack([torch.stack([kernel(a, b).sum() for b in of_y]) for a in of_x])
    selves = [torch.stack([kernel(a, a).diagonal().sum() for a in of]) for of in (of_x, of_y)]
    distances = []
    for g in range(num_groups):
        n, m = len(x) - len(of_x[g]), len(y) - len(of_y[g])
        left = [_sum_without(sums, g) for sums in (within_x, within_y, between)]
        same = [sums.sum() - sums[g] for sums in selves]
        distances.append(
            (left[0] - same[0]) / (n * (n - 1))
            + (left[1] - same[1]) / (m * (m - 1))
            - 2 * left[2] / (n * m)
        )
    return torch.stack(distances)


def _sum_without(sums: Float[Tensor, "g g"], group: int) -> Float[Tensor, ""]:
    kept = torch.arange(len(sums)) != group
    return sums[kept][:, kept].sum()


def kernel_distance_of_subsets(
    first: Float[Tensor, "n d"],
    second: Float[Tensor, "m d"],
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    kernel: Kernel = cubic,
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of both sets, as FID code reports them.

    A subset has at most as many videos as the smaller set.
    """
    x, y = checked_pair(first, second, least=2)
    if num_subsets < 1 or subset_size < 2:
        raise ValueError(
            f"{num_subsets} subsets of {subset_size}: must be at least one, of at least two"
        )
    size = min(subset_size, len(x), len(y))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(num_subsets):
        part_x, part_y = (z[torch.randperm(len(z), generator=generator)[:size]] for z in (x, y))
        values.append(kernel_distance(part_x, part_y, kernel))
    distances = torch.stack(values)
    return float(distances.mean()), float(distances.std(correction=0))


def _within(k: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """Mean over pairs of different videos."""
    return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))
