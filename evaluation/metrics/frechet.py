"""Fréchet distance between two sets of features, each taken for a Gaussian; all in float64.

    d² = |μ₁ - μ₂|² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁ Σ₂)^½

With Σ = A Aᵀ the last trace is the nuclear norm of A₁ᵀ A₂, the sum of its singular values. No
matrix root is taken, so the distance is right for singular covariances too (fewer videos than
features), where roots of products lose digits. Heusel et al., 2017 (FID, equation 6); Unterthiner
et al., 2018 (FVD).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from scipy.stats import t
from torch import Tensor

from evaluation.metrics.leave_out import distance_by_eigenvalues, distances_without_groups
from evaluation.metrics.moments import Moments, checked

Distance = Callable[[Float[Tensor, "n d"], Float[Tensor, "m d"]], Float[Tensor, ""]]
Groups = tuple[Int[Tensor, " n"], Int[Tensor, " m"]]
LeftOut = Sequence[Sequence[int]]
Parts = Callable[
    [Float[Tensor, "n d"], Float[Tensor, "m d"], Groups, int], Float[Tensor, " num_groups"]
]


def frechet_distance(
    first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]
) -> Float[Tensor, ""]:
    """Return the distance of two sets of at least two features each.

    It is 0 for equal sets and never below about -1e-10. Warns if a set has no more videos than
    features: the distance is then defined, but mostly bias. Raises ``ValueError`` for different
    widths, fewer than two videos, or values that are not finite.
    """
    x, y = checked_pair(first, second, least=2)
    if min(len(x), len(y)) <= x.shape[1]:
        warnings.warn(
            f"Fréchet distance of {len(x)} and {len(y)} videos with {x.shape[1]} features: "
            "covariances are singular and bias dominates; read it only beside its floor",
            stacklevel=2,
        )
    return _distance(x, y)


def frechet_distance_of_population(
    first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]
) -> Float[Tensor, ""]:
    """``frechet_distance`` with covariances divided by n instead of n - 1."""
    x, y = checked_pair(first, second, least=2)
    # Scaling centred rows by sqrt((n - 1) / n) turns the unbiased covariance into that over n.
    shrunk = (
        z.mean(dim=0) + (z - z.mean(dim=0)) * math.sqrt((len(z) - 1) / len(z)) for z in (x, y)
    )
    return _distance(*shrunk)


# Distances that depend only on moments, and the ddof of their covariances.
_DDOF: dict[Distance | None, int] = {
    None: 1,
    frechet_distance: 1,
    frechet_distance_of_population: 0,
}


def frechet_distance_of_moments(first: Moments, second: Moments) -> Float[Tensor, ""]:
    """``frechet_distance`` from means and scatters, which can be merged over shards."""
    return _from_factors(first.mean, first.factor(), second.mean, second.factor())


def _distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    return _from_factors(x.mean(dim=0), _factor(x), y.mean(dim=0), _factor(y))


def _factor(x: Float[Tensor, "n d"]) -> Float[Tensor, "d k"]:
    """A with A Aᵀ equal to the unbiased covariance, at most d columns wide."""
    centred = (x - x.mean(dim=0)) / math.sqrt(len(x) - 1)
    if len(x) > x.shape[1]:
        centred = torch.linalg.qr(centred, mode="r").R
    return centred.T


def _from_factors(
    mean_1: Float[Tensor, " d"],
    a_1: Float[Tensor, "d k"],
    mean_2: Float[Tensor, " d"],
    a_2: Float[Tensor, "d l"],
) -> Float[Tensor, ""]:
    between = (mean_1 - mean_2).square().sum()
    within = a_1.square().sum() + a_2.square().sum()
    return between + within - 2 * torch.linalg.svdvals(a_1.T @ a_2).sum()


def jackknife_interval(
    first: Float[Tensor, "n d"],
    second: Float[Tensor, "m d"],
    num_groups: int = 16,
    seed: int = 0,
    rows_per_video: int = 1,
    distance: Distance | None = None,
    parts: Parts | None = None,
) -> tuple[float, float]:
    """Return a 95 % interval of ``frechet_distance`` by a jackknife over ``num_groups`` groups.

    The plain jackknife is up to 1.4 times too wide, since it counts quadratic parts twice. That
    excess is estimated by leaving out pairs of groups, and subtracted (Efron and Stein, 1981). A
    bootstrap does not work here: its duplicates lower the rank and raise the distance, so that its
    interval excludes the estimate.

    Both sets are shuffled by ``seed`` and split into groups. If both have the same length, group g
    holds the same indices of both, so that the real and the generated video of a prompt are left
    out together. With ``rows_per_video``, this many successive rows are the frames of one video and
    are left out together. With another ``distance``, the plain jackknife is used. ``parts`` is a
    faster function for the distances without each group.
    """
    x, y = checked_pair(first, second, least=2)
    n, m = len(x) // rows_per_video, len(y) // rows_per_video
    num_groups = min(num_groups, n // 2, m // 2)
    if num_groups < 2:
        raise ValueError(f"{n} and {m} videos: a jackknife needs at least 4 of each")
    groups_x, groups_y = (
        _groups(number, num_groups, seed).repeat_interleave(rows_per_video) for number in (n, m)
    )
    groups = groups_x, groups_y
    value = float((distance or _distance)(x, y))
    if parts is not None:
        half = 1.96 * _jackknife_variance(parts(x, y, groups, num_groups)) ** 0.5
    else:
        half = _half_width(
            value,
            lambda left_out: _without(x, y, groups, left_out, distance),
            num_groups,
            distance in _DDOF,
        )
    # The Fréchet distance is never negative; an unbiased distance may be.
    low = value - half
    return (max(0.0, low) if distance is None else low), value + half


def jackknife_difference(
    first: Float[Tensor, "n d"],
    second: Float[Tensor, "n d"],
    reference: Float[Tensor, "m d"],
    num_groups: int = 16,
    seed: int = 0,
    distance: Distance | None = None,
) -> tuple[float, float, float, float, float]:
    """Return the difference of two distances to a reference, with its 95 % interval.

    The result is the distance of ``first``, that of ``second``, the second minus the first, and the
    bounds. Videos of one prompt must have the same index in both sets and are left out together.
    Raises ``ValueError`` for sets of different lengths, and as ``jackknife_interval`` does.
    """
    x, y = checked_pair(first, second, least=4)
    z, _ = checked_pair(reference, first, least=4)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} videos: pairs need sets of one length")
    num_groups = min(num_groups, len(x) // 2, len(z) // 2)
    of = distance or _distance
    groups = _groups(len(x), num_groups, seed), _groups(len(z), num_groups, seed)

    def without(left_out: LeftOut) -> Float[Tensor, " l"]:
        of_second, of_first = (_without(w, z, groups, left_out, distance) for w in (y, x))
        return of_second - of_first

    one, two = float(of(x, z)), float(of(y, z))
    half = _half_width(two - one, without, num_groups, distance in _DDOF)
    return one, two, two - one, two - one - half, two - one + half


def _half_width(
    value: float,
    without: Callable[[LeftOut], Float[Tensor, " l"]],
    num_groups: int,
    corrected: bool,
) -> float:
    """Half the width of a 95 % interval about ``value``, by Student's t with one degree less than
    groups.

    The jackknife's variance counts the contribution of pairs of groups twice. That contribution is
    the variance of second differences, estimated over each group and the four that follow it.
    """
    found = without([[g] for g in range(num_groups)])
    variance = _jackknife_variance(found)
    if not corrected or num_groups < 6:
        return 1.96 * variance**0.5
    pairs = [[g, (g + k) % num_groups] for k in range(1, 5) for g in range(num_groups)]
    second = torch.stack([value - found[g] - found[h] for g, h in pairs]) + without(pairs)
    of_pairs = num_groups * (num_groups - 1) / 2 * float(second.var(correction=0))
    return float(t.ppf(0.975, num_groups - 1)) * max(variance - of_pairs, variance / 2) ** 0.5


def _jackknife_variance(found: Float[Tensor, " g"]) -> float:
    return (len(found) - 1) * float(found.var(correction=0))


def _without(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    groups: Groups,
    left_out: LeftOut,
    distance: Distance | None,
) -> Float[Tensor, " l"]:
    """Distances without the groups of each entry of ``left_out``."""
    largest = max(map(len, left_out))
    rows = min(len(of) - largest * int(of.bincount().max()) for of in groups)
    if distance in _DDOF and rows > x.shape[1]:
        return distances_without_groups(x, y, groups, left_out, _DDOF[distance])
    of, (in_x, in_y) = distance or _distance, groups
    kept = [[~torch.isin(side, torch.tensor(out)) for side in (in_x, in_y)] for out in left_out]
    return torch.stack([of(x[of_x], y[of_y]) for of_x, of_y in kept])


def _quick(distance: Distance | None) -> Distance:
    """Return a faster distance for means over many subsets.

    It uses eigenvalues if there are more rows than features.
    """
    if distance not in _DDOF:
        assert distance is not None
        return distance
    exact, ddof = distance or _distance, _DDOF[distance]

    def of(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
        if min(len(x), len(y)) <= x.shape[1]:
            return exact(x, y)
        return distance_by_eigenvalues(Moments.of(x), Moments.of(y), ddof)

    return of


def _groups(n: int, num_groups: int, seed: int) -> Int[Tensor, " n"]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator) % num_groups


def _rows(videos: Int[Tensor, " n"], rows_per_video: int) -> Int[Tensor, " m"]:
    """Indices of all rows of these videos."""
    return (videos[:, None] * rows_per_video + torch.arange(rows_per_video)).flatten()


def frechet_distance_at_infinity(
    first: Float[Tensor, "n d"],
    second: Float[Tensor, "m d"],
    num_points: int = 10,
    repeats: int = 4,
    seed: int = 0,
    rows_per_video: int = 1,
    distance: Distance | None = None,
) -> float:
    """Extrapolate the distance to infinitely many videos.

    A line is fitted to distances over 1 / n and evaluated at 0. Both sets are subsampled without
    replacement to the same n, from half of the smaller set to all of it. Chong and Forsyth, 2019,
    arXiv 1911.07023, subsample only one set, which leaves the bias of the other.
    """
    x, y = checked_pair(first, second, least=8)
    of = _quick(distance)
    generator = torch.Generator().manual_seed(seed)
    sizes = [len(z) // rows_per_video for z in (x, y)]
    whole = min(sizes)
    inverse, distances = [], []
    for n in torch.linspace(whole / 2, whole, num_points).round().long().tolist():
        for _ in range(repeats):
            part_x, part_y = (
                z[_rows(torch.randperm(size, generator=generator)[:n], rows_per_video)]
                for z, size in zip((x, y), sizes, strict=True)
            )
            inverse.append(1 / n)
            distances.append(of(part_x, part_y))
    line = torch.stack([torch.ones(len(inverse)), torch.tensor(inverse)], dim=1).double()
    return float(torch.linalg.lstsq(line, torch.stack(distances)[:, None]).solution[0, 0])


def distance_between_halves(
    first: Float[Tensor, "n d"],
    second: Float[Tensor, "n d"],
    repeats: int = 10,
    seed: int = 0,
    rows_per_video: int = 1,
    distance: Distance | None = None,
) -> float:
    """Mean distance between a random half of ``first`` and the other half of ``second``.

    If both are the same set, this is the floor: the distance between two sets of n / 2 videos from
    one distribution. If they are real and generated videos of the same prompts, in the same order,
    the result can be compared with the floor: n is the same, and no prompt is on both sides. Raises
    ``ValueError`` for sets of different lengths.
    """
    x, y = checked_pair(first, second, least=4)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} videos: halves are cut from sets of one length")
    of = _quick(distance)
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(repeats):
        order = torch.randperm(len(x) // rows_per_video, generator=generator)
        half = len(order) // 2
        one, other = (_rows(part, rows_per_video) for part in order[: 2 * half].split(half))
        distances.append(of(x[one], y[other]))
    return float(torch.stack(distances).mean())


def distance_beside_others(
    first: Float[Tensor, "n d"] | None,
    pool: Float[Tensor, "m d"],
    sizes: tuple[int, int],
    repeats: int = 10,
    seed: int = 0,
    rows_per_video: int = 1,
    distance: Distance | None = None,
) -> float:
    """Mean distance between a set and unrelated videos of the ``pool``.

    ``sizes`` are the numbers of videos on the two sides, together at most that of the pool. Each
    repeat draws two disjoint sets from the pool. Without ``first``, their distance is the floor at
    these sizes. Otherwise ``first``, which has ``sizes[0]`` videos, replaces the first of them.
    With ``repeats`` = 0 the pool is not shuffled; use it if ``first`` has the prompts of the pool's
    first videos, so that no prompt is on both sides. Raises ``ValueError`` if the pool is too
    small.
    """
    x, _ = checked_pair(pool, pool if first is None else first, least=4)
    n, m = sizes
    if n + m > len(x) // rows_per_video:
        raise ValueError(
            f"{len(x) // rows_per_video} videos: two sets apart of {n} and {m} need {n + m}"
        )
    generator, of = torch.Generator().manual_seed(seed), _quick(distance)
    whole = len(x) // rows_per_video
    orders = [torch.randperm(whole, generator=generator) for _ in range(repeats)]
    distances = []
    for order in orders or [torch.arange(whole)]:
        one, other = (_rows(part, rows_per_video) for part in order[: n + m].split([n, m]))
        distances.append(of(x[one] if first is None else first.double(), x[other]))
    return float(torch.stack(distances).mean())


def checked_pair(
    first: Float[Tensor, "n d"], second: Float[Tensor, "m d"], least: int
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Convert both sets to float64.

    Raises ``ValueError`` for different widths, fewer than ``least`` videos, or values that are not
    finite.
    """
    x, y = checked(first, least), checked(second, least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"features of {x.shape[1]} and of {y.shape[1]} values: widths must be equal"
        )
    return x, y
