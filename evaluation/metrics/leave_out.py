"""Fréchet distances of a pair of sets, each time without one group of them, from one pass over the
features: what a jackknife asks for.

Means and scatters decide the distance, and those without a group are those of all less the group's.
So no set is decomposed anew: a part costs two sums of scatters, one Cholesky factor and the
eigenvalues of one symmetric matrix, whatever the number of videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from evaluation.metrics.moments import Moments


def distances_without_groups(
    first: Float[Tensor, "n d"],
    second: Float[Tensor, "m d"],
    groups: tuple[Int[Tensor, " n"], Int[Tensor, " m"]],
    left_out: Sequence[Sequence[int]],
    ddof: int,
) -> Float[Tensor, " l"]:
    """Distances without the groups of each entry of ``left_out``, for sets that hold more rows than
    features without them. ``ddof`` is 1 for unbiased covariances, 0 for those of the sets.
    """
    sides = list(zip((first, second), groups, strict=True))
    wholes = [Moments.of(x) for x, _ in sides]
    of_group: list[dict[int, Moments]] = [
        {g: Moments.of(x[of == g]) for g in of.unique().tolist()} for x, of in sides
    ]
    parts = []
    for out in left_out:
        one, two = (
            reduce(Moments.less, [moments[g] for g in out], whole)
            for whole, moments in zip(wholes, of_group, strict=True)
        )
        parts.append(distance_by_eigenvalues(one, two, ddof))
    return torch.stack(parts)


def distance_by_eigenvalues(first: Moments, second: Moments, ddof: int = 1) -> Float[Tensor, ""]:
    """The Fréchet distance with tr (Σ₁ Σ₂)^½ as the roots of the eigenvalues of Lᵀ Σ₂ L, Σ₁ = L Lᵀ.

    Half the work of the singular values that ``frechet_distance`` takes, and half the digits where
    covariances are nearly singular: enough for the spread of parts, not for a distance of nearly
    equal sets. Where a feature is constant there is no L, and singular values are taken.
    """
    one, two = (moments.scatter / (moments.n - ddof) for moments in (first, second))
    between = (first.mean - second.mean).square().sum()
    lower, failed = torch.linalg.cholesky_ex(one)
    if failed:
        factors = [moments.factor(ddof) for moments in (first, second)]
        roots = torch.linalg.svdvals(factors[0].T @ factors[1]).sum()
    else:
        roots = torch.linalg.eigvalsh(lower.T @ two @ lower).clamp(min=0).sqrt().sum()
    return between + one.trace() + two.trace() - 2 * roots
