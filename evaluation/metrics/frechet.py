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
    """Distance of two sets of at least two features each; 0 for equal sets, never below about
    -1e-10.

    Warns where a set has no more videos than features: the distance is then defined, but mostly
    bias. Raises ``ValueError`` for sets of other widths, of fewer than two videos, or not finite.
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
    """The same with covariances of the sets themselves, divided by n and not by n - 1."""
    x, y = checked_pair(first, second, least=2)
    # Deviations shrunk by the root of (n - 1) / n have as unbiased covariance that of the set.
    shrunk = (
        z.mean(dim=0) + (z - z.mean(dim=0)) * math.sqrt((len(z) - 1) / len(z)) for z in (x, y)
    )
    return _distance(*shrunk)


# Distances that moments decide, and what their covariances take off the number of videos.
_DDOF: dict[Distance | None, int] = {
    None: 1,
    frechet_distance: 1,
    frechet_distance_of_population: 0,
}


def frechet_distance_of_moments(first: Moments, second: Moments) -> Float[Tensor, ""]:
    """The same from means and scatters, which merge over shards of any size."""
    return _from_factors(first.mean, first.factor(), second.mean, second.factor())


def _distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    return _from_factors(x.mean(dim=0), _factor(x), y.mean(dim=0), _factor(y))


def _factor(x: Float[Tensor, "n d"]) -> Float[Tensor, "d k"]:
    """A with A Aᵀ the unbiased covariance, at most d columns wide."""
    deviations = (x - x.mean(dim=0)) / math.sqrt(len(x) - 1)
    if len(x) > x.shape[1]:
        deviations = torch.linalg.qr(deviations, mode="r").R
    return deviations.T


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

    The plain jackknife is up to 1.4 times too wide, since it counts quadratic parts twice. Their
    excess is estimated from leaving out pairs of groups and taken off (Efron and Stein, 1981). The
    bootstrap is of no use here: its duplicates lower the rank and raise the distance, so that
    its interval excludes the estimate. Both sets are shuffled by ``seed`` and cut into groups; when
    both have one length, group g holds the same places of both, so that pairs (a prompt's real and
    generated video) leave together. With ``rows_per_video``, as many rows in succession are the
    frames of one video and leave together. Another ``distance`` than Fréchet's may be given, which
    keeps the plain jackknife, and ``parts``, a quicker way to have it without each group.
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
    # Fréchet's is never negative; an unbiased one is, as often as not, where nothing differs.
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
    """Distance of ``first`` and of ``second`` from the reference, the second less the first, and
    the 95 % interval of that. Videos of the same prompts, in the same order, leave together.

    Raises ``ValueError`` for sets of two lengths, and as ``jackknife_interval`` does.
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
    """Half of a 95 % interval about ``value``, by Student's t with a degree less than groups.

    The jackknife's variance counts the part of pairs of groups twice. That part is the variance of
    second differences, here over each group and the four that follow it.
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
    """The same for the mean over many subsets: by eigenvalues where there are rows enough."""
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
    """The places of all rows of these videos."""
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
    """The distance that endlessly many videos would have: a line through the distance over 1 / n,
    at 0.

    Both sets are subsampled without replacement to the same n, from half of the smaller set to the
    whole of it. Chong and Forsyth, 2019, arXiv 1911.07023; they subsample one side alone, which
    leaves the other's bias in.
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

    With one set given twice this is the floor: what two sets of n / 2 videos differ by when nothing
    differs. With real and generated videos of the same prompts, in the same order, it is their
    distance at the same n and with the same disjoint prompts, so that the two compare. Raises
    ``ValueError`` for sets of two lengths.
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
    """Mean distance between one set and videos of the ``pool`` that have nothing to do with it.

    ``sizes`` are the numbers of videos on the two sides, together at most the pool's. Each repeat
    draws them apart from the pool: without ``first`` their distance is the floor at these numbers,
    and ``first``, of as many videos as ``sizes[0]``, takes the place of the one side. Where it has
    the prompts of the pool's first videos, in their order, ask for no ``repeats``: 0 leaves the
    pool as it is, so that no prompt is on both sides. Raises ``ValueError`` for too small a pool.
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
    """Both in float64. Raises ``ValueError`` for sets of other widths, of fewer than ``least``
    videos, or not finite.
    """
    x, y = checked(first, least), checked(second, least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"features of {x.shape[1]} and of {y.shape[1]} values: widths must be equal"
        )
    return x, y
