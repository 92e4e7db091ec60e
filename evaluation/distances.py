"""Two sets of features in, distances out: each with its interval, and beside what real videos reach
among themselves.
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

# From this many features on a distance takes seconds, and means are over fewer repetitions.
_WIDE, _FEW_REPEATS = 1024, {"halves": 3, "infinity": 1}


@dataclass(frozen=True)
class FeatureSets:
    """Features of what is evaluated and of real videos, ``rows_per_video`` in succession for each.

    ``spare`` are of further real videos, which no score is made of: with as many of them as of
    generated ones the floor stands at the score's own numbers. ``paired`` says that generated
    videos have the prompts of the first real ones, in their order.
    """

    generated: Float[Tensor, "n d"]
    reference: Float[Tensor, "m d"]
    spare: Float[Tensor, "s d"] | None = None
    rows_per_video: int = 1
    paired: bool = False

    @property
    def pool(self) -> Float[Tensor, "p d"]:
        """All real ones."""
        rest = [] if self.spare is None else [self.spare]
        return torch.cat([self.reference, *rest])

    def videos(self, features: Float[Tensor, "k d"]) -> int:
        return len(features) // self.rows_per_video

    @property
    def beside(self) -> tuple[int, int] | None:
        """Numbers of videos of two real sets apart that compare with the whole of the generated
        ones: as many as these, and as many others as the score has, or at least as many again.
        ``None`` where there are not so many.
        """
        n, m = self.videos(self.generated), self.videos(self.reference)
        others = min(m, self.videos(self.pool) - n)
        return (n, others) if others >= min(n, m) else None


def frechet_scores(sets: FeatureSets, spec: ScoreSpec, names: tuple[str, str]) -> dict[str, Score]:
    """The Fréchet distance with its interval; what endlessly many videos would give; the floor and
    the distance that compares with it, at all of the generated videos where the real ones suffice,
    else at half; and the kernel distance with its interval and floor. ``names`` are those of the
    two distances.
    """
    fvd, kvd = names
    of = frechet_distance if spec.covariance_ddof else frechet_distance_of_population
    width = sets.generated.shape[1]
    repeats = _FEW_REPEATS if width >= _WIDE else {"halves": 10, "infinity": 4}
    settings: dict[str, Any] = {"seed": spec.seed, "rows_per_video": sets.rows_per_video}
    pair = sets.generated, sets.reference
    with warnings.catch_warnings():
        # The report says it beside the score.
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
            meaning="What endlessly many videos would give, by a line through the distances of "
            f"{of_subsets}.",
        ),
        f"{fvd}/{floor.beside}": floor.of_generated(),
        f"{fvd}/floor": floor.of_real("No model should be expected below it."),
        kvd: score(
            float(kernel_distance(*pair)),
            meaning="Unbiased kernel distance by the same features: about 0 where nothing differs, "
            "at any number of videos, and then as often below as above.",
            low=kernel_interval[0],
            high=kernel_interval[1],
        ),
        f"{kvd}/floor": kernel_floor.of_real("About 0."),
    }


@dataclass(frozen=True)
class _Floor:
    """A distance between real videos, and that of generated ones which compares with it."""

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
        # Both sides are cut at the same places, so the two must be of one length.
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
                "The same with half the videos on each side and no prompt on both: to read beside "
                "the floor."
            )
        else:
            text = (
                f"The same with the {n} generated videos and {m} of the real ones"
                f"{', no prompt on both' if self.paired else ''}: to read beside the floor."
            )
        return Score(self.generated, self.n, text, "lower")

    def of_real(self, rule: str) -> Score:
        n, m = self.sizes
        if self.beside == "half":
            text = (
                f"The same between two halves of the real videos, {self.over}: what remains when "
                "nothing differs. At half the score's numbers, since there are not twice as many "
                "real videos as are evaluated."
            )
        else:
            text = (
                f"The same between {n} real videos and {m} others, {self.over}: what remains when "
                "nothing differs, at the score's own number of videos."
            )
        return Score(self.real, self.n, f"{text} {rule}", "")
