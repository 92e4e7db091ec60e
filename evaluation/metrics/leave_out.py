"""Fréchet distances without each group of videos, for a jackknife, in one pass over the features.

The distance depends only on means and scatter matrices, and those without a group are differences
of the whole's and the group's. Each distance costs two sums of scatters, one Cholesky factor and
the eigenvalues of one symmetric matrix, whatever the number of videos.
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
    """Return the distance without the groups of each entry of ``left_out``.

    Without those groups each set must hold more rows than features. ``ddof`` is 1 for unbiased
    covariances and 0 for division by n.
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
    """Fréchet distance with tr (Σ₁ Σ₂)^½ from the eigenvalues of Lᵀ Σ₂ L, where Σ₁ = L Lᵀ.

    It takes half the work of the singular values in ``frechet_distance``, but has half the digits
    if covariances are nearly singular. That suffices for the spread of a jackknife, not for the
    distance of nearly equal sets. Singular values are used if Σ₁ has no Cholesky factor (a constant
    feature).
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
