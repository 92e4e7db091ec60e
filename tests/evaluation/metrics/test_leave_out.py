"""Parts of a jackknife by one pass over the features are the distances of sets cut anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evaluation.metrics import frechet_distance, kernel_distance
from evaluation.metrics.frechet import (
    frechet_distance_of_population,
    jackknife_difference,
    jackknife_interval,
)
from evaluation.metrics.kernel import kernel_distances_without_each_group
from evaluation.metrics.leave_out import distance_by_eigenvalues, distances_without_groups
from evaluation.metrics.moments import Moments


def normal(n: int, d: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=draw, dtype=torch.float64)


def uneven(n: int, d: int, seed: int) -> Tensor:
    """Features of very unequal sizes, far from zero, as networks give them."""
    return 5 + normal(n, d, seed) * torch.logspace(-3, 1, d, dtype=torch.float64)


def test_a_set_less_a_part_is_the_rest() -> None:
    x = 1e4 + normal(200, 6, 0)
    less, rest = Moments.of(x).less(Moments.of(x[150:])), Moments.of(x[:150])
    assert less.n == rest.n == 150
    assert torch.allclose(less.mean, rest.mean, rtol=1e-12)
    assert torch.allclose(less.scatter, rest.scatter, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(
    ("ddof", "of"), [(1, frechet_distance), (0, frechet_distance_of_population)]
)
def test_parts_by_one_pass_are_those_of_sets_cut_anew(ddof, of, constant) -> None:
    """Also where a feature never changes and no Cholesky factor exists."""
    x, y = uneven(160, 12, 0), 0.5 + 1.2 * uneven(120, 12, 1)
    if constant:
        x[:, 3] = y[:, 3] = 0
    groups = torch.arange(160) % 6, torch.arange(120) % 6
    left_out = [*([g] for g in range(6)), [1, 4]]
    parts = distances_without_groups(x, y, groups, left_out, ddof)
    kept = [[~torch.isin(side, torch.tensor(out)) for side in groups] for out in left_out]
    anew = [of(x[of_x], y[of_y]) for of_x, of_y in kept]
    torch.testing.assert_close(parts, torch.stack(anew), rtol=1e-6, atol=0)
    assert parts.std() > 1e-3 * parts.mean()  # parts differ by much more than they are compared to


def test_eigenvalues_and_singular_values_agree() -> None:
    x, y = uneven(60, 8, 0), uneven(90, 8, 1)
    by_eigenvalues = distance_by_eigenvalues(Moments.of(x), Moments.of(y))
    torch.testing.assert_close(by_eigenvalues, frechet_distance(x, y), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [1, 3])
def test_intervals_are_those_of_sets_cut_anew(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = uneven(180, 10, 0), 0.3 + 2 * uneven(240, 10, 1)

    def anew(a: Tensor, b: Tensor, groups: tuple[Tensor, Tensor], left_out, ddof: int) -> Tensor:
        kept = [[~torch.isin(side, torch.tensor(out)) for side in groups] for out in left_out]
        return torch.stack([frechet_distance(a[of_a], b[of_b]) for of_a, of_b in kept])

    quick = jackknife_interval(x, y, 8, rows_per_video=rows)
    pairs = jackknife_difference(x, y[:180], y[180:], 8)
    monkeypatch.setattr("evaluation.metrics.frechet.distances_without_groups", anew)
    assert quick == pytest.approx(jackknife_interval(x, y, 8, rows_per_video=rows), rel=1e-5)
    assert pairs == pytest.approx(jackknife_difference(x, y[:180], y[180:], 8), rel=1e-5)


def test_kernel_parts_by_one_pass_are_those_of_sets_cut_anew() -> None:
    x, y = normal(50, 6, 0), 0.4 + normal(41, 6, 1)
    groups = torch.arange(50) % 5, torch.arange(41) % 5
    parts = kernel_distances_without_each_group(x, y, groups, 5)
    anew = [kernel_distance(x[groups[0] != g], y[groups[1] != g]) for g in range(5)]
    torch.testing.assert_close(parts, torch.stack(anew), rtol=1e-10, atol=1e-12)
