"""Distances between two sets of features, with intervals and with floors.

A floor is the same distance between two sets of real videos.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from evaluation.metrics.frechet import (
    Distance,
    distance_beside_others,
    distance_between_halves,
    frechet_distance,
    frechet_distance_at_infinity,
    frechet_distance_of_population,
    jackknife_interval,
)
from evaluation.metrics.kernel import kernel_distance, kernel_distances_without_each_group
from evaluation.metrics.score import Score
from evaluation.protocol import ScoreSpec

# With this many features a distance takes seconds, so means are over fewer repetitions.
_WIDE, _FEW_REPEATS = 1024, {"halves": 3, "infinity": 1}


@dataclass(frozen=True)
class FeatureSets:
    """Features of generated and of real videos, ``rows_per_video`` successive rows for each.

    ``spare`` are features of additional real videos, which are used for floors only. With as many
    of them as generated videos, the floor has the same sample size as the score. ``paired`` states
    that the generated videos have the prompts of the first real ones, in their order.
    """

    generated: Float[Tensor, "n d"]
    reference: Float[Tensor, "m d"]
    spare: Float[Tensor, "s d"] | None = None
    rows_per_video: int = 1
    paired: bool = False

    @property
    def pool(self) -> Float[Tensor, "p d"]:
        """Features of all real videos, including the spare ones."""
        rest = [] if self.spare is None else [self.spare]
        return torch.cat([self.reference, *rest])

    def videos(self, features: Float[Tensor, "k d"]) -> int:
        return len(features) // self.rows_per_video

    @property
    def beside(self) -> tuple[int, int] | None:
        """Sizes of two disjoint sets of real videos whose distance is a floor for the whole score.

        The first has the number of generated videos, the second that of the reference or at least
        as many as the first. ``None`` if there are not enough real videos.
        """
        n, m = self.videos(self.generated), self.videos(self.reference)
        others = min(m, self.videos(self.pool) - n)
        return (n, others) if others >= min(n, m) else None


def frechet_scores(sets: FeatureSets, spec: ScoreSpec, names: tuple[str, str]) -> dict[str, Score]:
    """Return the scores of a pair of feature sets, for the two ``names`` of the distances.

    They are the Fréchet distance with its interval, its extrapolation to infinitely many videos,
    its floor, and the distance to compare with the floor. The last two use all generated videos if
    there are enough real ones, otherwise half of them. The kernel distance follows with its
    interval and floor.
    """
    fvd, kvd = names
    of = frechet_distance if spec.covariance_ddof else frechet_distance_of_population
    width = sets.generated.shape[1]
    repeats = _FEW_REPEATS if width >= _WIDE else {"halves": 10, "infinity": 4}
    settings: dict[str, Any] = {"seed": spec.seed, "rows_per_video": sets.rows_per_video}
    pair = sets.generated, sets.reference
    with warnings.catch_warnings():
        # The report states it in the meaning of the score.
        warnings.simplefilter("ignore", UserWarning)
        value = float(of(*pair))
        interval = jackknife_interval(*pair, spec.jackknife_groups, distance=of, **settings)
        infinity = frechet_distance_at_infinity(
            *pair, repeats=repeats["infinity"], distance=of, **settings
        )
        floor = _Floor.of(sets, of, repeats["halves"], spec.seed)
    kernel_interval = jackknife_interval(
        *pair,
        spec.jackknife_groups,
        distance=kernel_distance,
        parts=kernel_distances_without_each_group,
        **settings,
    )
    kernel_floor = _Floor.of(sets, kernel_distance, repeats["halves"], spec.seed)
    num_videos = min(sets.videos(side) for side in pair)
    score = partial(Score, n=num_videos, better="lower")
    kind = "frames of " if sets.rows_per_video > 1 else ""
    few = ""
    if floor.n * sets.rows_per_video <= width:
        few = " Fewer videos than features: mostly bias."
    of_subsets = f"{10 * repeats['infinity']} subsets of both sides"
    return {
        fvd: score(
            value,
            meaning=f"Fréchet distance between {kind}generated and real videos by the features of "
            f"the network in its name, under this protocol alone.{few}",
            low=max(0.0, interval[0]),
            high=interval[1],
        ),
        f"{fvd}/infinity": score(
            infinity,
            meaning="Extrapolation to infinitely many videos by a line through the distances "
            f"of {of_subsets}.",
        ),
        f"{fvd}/{floor.beside}": floor.of_generated(),
        f"{fvd}/floor": floor.of_real("No model should be expected below it."),
        kvd: score(
            float(kernel_distance(*pair)),
            meaning="Unbiased kernel distance by the same features: about 0, of either sign, for "
            "sets of one distribution, at any number of videos.",
            low=kernel_interval[0],
            high=kernel_interval[1],
        ),
        f"{kvd}/floor": kernel_floor.of_real("About 0."),
    }


@dataclass(frozen=True)
class _Floor:
    """A distance between real videos, and the distance of generated videos with the same sizes."""

    real: float
    generated: float
    sizes: tuple[int, int]
    beside: str
    over: str
    paired: bool = False

    @property
    def n(self) -> int:
        return min(self.sizes)

    @classmethod
    def of(cls, sets: FeatureSets, distance: Distance, repeats: int, seed: int) -> _Floor:
        settings: dict[str, Any] = {
            "seed": seed,
            "rows_per_video": sets.rows_per_video,
            "distance": distance,
        }
        if sets.beside is not None:
            draws = 0 if sets.paired else repeats
            real, generated = (
                distance_beside_others(side, sets.pool, sets.beside, draws, **settings)
                for side in (None, sets.generated)
            )
            over = "one division" if sets.paired else f"mean over {draws} divisions"
            return cls(real, generated, sets.beside, "apart", over, sets.paired)
        # Halves of both sets have the same indices, so both must have the same length.
        n = min(len(sets.generated), len(sets.reference))
        real, generated = (
            distance_between_halves(sets.reference[:n], side[:n], repeats, **settings)
            for side in (sets.reference, sets.generated)
        )
        half = n // sets.rows_per_video // 2
        return cls(real, generated, (half, half), "half", f"mean over {repeats} divisions")

    def of_generated(self) -> Score:
        n, m = self.sizes
        if self.beside == "half":
            text = (
                "Distance of half of the generated videos to half of the real ones, without common "
                "prompts. Compare it with the floor."
            )
        else:
            text = (
                f"Distance of the {n} generated videos to {m} of the real ones"
                f"{', without common prompts' if self.paired else ''}. Compare it with the floor."
            )
        return Score(self.generated, self.n, text, "lower")

    def of_real(self, rule: str) -> Score:
        n, m = self.sizes
        if self.beside == "half":
            text = (
                f"Distance between two halves of the real videos, {self.over}. It has half the "
                "score's sample size, since there are not twice as many real videos as evaluated."
            )
        else:
            text = (
                f"Distance between {n} real videos and {m} others, {self.over}, at the score's own "
                "sample size."
            )
        return Score(self.real, self.n, f"{text} {rule}", "")
