"""Two real processes, one of them without any video of a kind, and videos that both have: every
metric gives on both what one process gives alone.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric

from evaluation.metrics import (
    ClipScore,
    Diversity,
    FrechetDistanceOfMoments,
    FrechetFrameDistance,
    FrechetVideoDistance,
    FrechetVideoDistanceAtInfinity,
    KernelFrameDistance,
    KernelVideoDistance,
    Motion,
    NearestNeighbour,
    Reconstruction,
    ShapeAlignment,
    TemporalConsistency,
)
from sora_lightning.systems.time_bins import LossPerTime

NUM_REAL, NUM_VIDEOS = 14, 31
# Generated videos of rank 0 and of rank 1: 21 is on both, as padded samplers have it.
SHARES = (range(NUM_REAL, 22), range(21, NUM_VIDEOS))
ALONE = (range(NUM_REAL, NUM_VIDEOS),)


class MeanColour(nn.Module):
    """Three features that a test can work out by hand."""

    def forward(self, videos: Tensor) -> Tensor:
        return videos.double().mean(dim=(2, 3, 4))


class Colours:
    """Embeds by the mean colour."""

    def embed_videos(self, videos: Tensor) -> Tensor:
        return nn.functional.normalize(videos.float().mean(dim=(2, 3, 4)), dim=-1)

    def embed_frames(self, videos: Tensor) -> Tensor:
        return nn.functional.normalize(videos.float().mean(dim=(3, 4)).mT, dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        rows = [[float(len(text)), 1.0, 2.0] for text in texts]
        return nn.functional.normalize(torch.tensor(rows), dim=-1)


def clips() -> Tensor:
    draw = torch.Generator().manual_seed(0)
    videos = torch.randint(0, 256, (NUM_VIDEOS, 3, 4, 12, 12), generator=draw, dtype=torch.uint8)
    # Colours of their own, or all embeddings would be one.
    return videos // torch.randint(1, 6, (NUM_VIDEOS, 3, 1, 1, 1), generator=draw).byte()


def prompt(index: int) -> str:
    return f"a {('red', 'blue')[index % 2]} circle moves left"


Update = Callable[[Metric, Tensor, Sequence[int]], None]


def real_and_generated(metric: Metric, videos: Tensor, ids: Sequence[int]) -> None:
    """Only the rank with the first generated video has real ones: the other has none."""
    if NUM_REAL in ids:
        metric.update(videos[:NUM_REAL], range(NUM_REAL), real=True)
    metric.update(videos[list(ids)], ids, real=False)


def without_ids(metric: Metric, videos: Tensor, ids: Sequence[int]) -> None:
    """Sums cannot tell copies: each video stands on one rank."""
    if NUM_REAL in ids:
        metric.update(videos[:NUM_REAL], real=True)
    metric.update(videos[once(ids)], real=False)


def once(ids: Sequence[int]) -> list[int]:
    return [i for i in ids if ids[-1] != 21 or i != 21]


def generated(metric: Metric, videos: Tensor, ids: Sequence[int]) -> None:
    metric.update(videos[list(ids)], ids)


def one_rank_alone(metric: Metric, videos: Tensor, ids: Sequence[int]) -> None:
    """The rank with the first video has them all; the other one is never updated."""
    if NUM_REAL in ids:
        metric.update(videos, range(NUM_VIDEOS))


def with_texts(metric: Metric, videos: Tensor, ids: Sequence[int]) -> None:
    metric.update(videos[list(ids)], [prompt(i) for i in ids], ids)


def as_pairs(metric: Metric, videos: Tensor, ids: Sequence[int]) -> None:
    metric.update(videos[list(ids)], videos.flip(0)[list(ids)], ids)


def as_arrays(metric: Metric, videos: Tensor, ids: Sequence[int]) -> None:
    arrays = [videos[i].permute(1, 2, 3, 0).numpy() for i in ids]
    metric.update(arrays, [prompt(i) for i in ids], ids)


def losses(metric: Metric, videos: Tensor, ids: Sequence[int]) -> None:
    mine = once(ids)
    metric.update(torch.tensor(mine) / NUM_VIDEOS, videos[mine].float().mean(dim=(1, 2, 3, 4)))


METRICS: dict[str, tuple[Callable[[], Metric], Update]] = {
    "fvd": (lambda: FrechetVideoDistance(MeanColour(), 3), real_and_generated),
    "infinity": (lambda: FrechetVideoDistanceAtInfinity(MeanColour(), 3), real_and_generated),
    "kvd": (lambda: KernelVideoDistance(MeanColour(), 3), real_and_generated),
    "moments": (lambda: FrechetDistanceOfMoments(MeanColour(), 3), without_ids),
    "fid": (lambda: FrechetFrameDistance(MeanColour(), 3, num_frames=2), real_and_generated),
    "kid": (lambda: KernelFrameDistance(MeanColour(), 3, num_frames=2), real_and_generated),
    "nearest": (lambda: NearestNeighbour(MeanColour(), 3), real_and_generated),
    "diversity": (lambda: Diversity(MeanColour(), 3), generated),
    "diversity of one rank": (lambda: Diversity(MeanColour(), 3), one_rank_alone),
    "clip": (lambda: ClipScore(Colours()), with_texts),
    "consistency": (lambda: TemporalConsistency(Colours()), generated),
    "motion": (Motion, generated),
    "reconstruction": (Reconstruction, as_pairs),
    "alignment": (ShapeAlignment, as_arrays),
    "loss per time": (LossPerTime, losses),
}


def compute_all(ids: Sequence[int]) -> dict[str, dict[str, float]]:
    videos, values = clips(), {}
    for name, (build, update) in METRICS.items():
        metric = build()
        update(metric, videos, ids)
        value = metric.compute()
        of_name = value if isinstance(value, dict) else {name: value}
        values[name] = {key: float(one) for key, one in of_name.items()}
    return values


def _as_rank(rank: int, init: str) -> dict[str, dict[str, float]]:
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    try:
        return compute_all(SHARES[rank])
    finally:
        dist.destroy_process_group()


def _other_rank(init: str, answers: multiprocessing.Queue[Any]) -> None:
    torch.set_num_threads(1)
    answers.put(_as_rank(1, init))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Fréchet distance of", "ignore:The ``compute`` method")
def test_two_uneven_ranks_equal_one(tmp_path: Path) -> None:
    alone = compute_all(ALONE[0])
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    init = f"file://{tmp_path / 'store'}"
    other = context.Process(target=_other_rank, args=(init, answers))
    other.start()
    both = [_as_rank(0, init), answers.get(timeout=300)]
    other.join()
    for values in both:
        assert values.keys() == alone.keys()
        for name, expected in alone.items():
            assert values[name] == pytest.approx(expected, rel=1e-10), name
    # The shares are not the whole: without gathering they would differ.
    assert compute_all(SHARES[0])["motion"] != pytest.approx(alone["motion"], rel=1e-6)
