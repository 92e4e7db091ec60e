"""Packs waste almost nothing, leave nothing out, cost the ranks alike, and depend on the seed and
the position alone.
"""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest

from sora_lightning.data import Packing, Removal, VideoMetadata
from sora_lightning.data.batching.native_sizes import (
    BetaDropping,
    LengthDropping,
    NativeSizes,
    NormalSide,
    Resolution,
    ScheduledDropping,
    UniformSide,
    shown,
)
from sora_lightning.data.batching.packing import (
    PackPlan,
    Packs,
    best_fit,
    clip_costs,
    pack_costs,
    padding_waste,
    plan_epoch,
    split_to_multiple,
)
from sora_lightning.data.batching.sampler import shuffled
from sora_lightning.types import VideoSize
from tests.data.batching.mixture import LARGEST_AREA, TOKENS, mixture

PACKING = Packing(TOKENS, "4x8x8", 121, LARGEST_AREA)
SMALL = Packing(64, "4x8x8", 13, 64 * 64, (1, 2, 2))


def efficiency(packs: Packs, tokens: np.ndarray, num_ranks: int, attention_tokens: int) -> float:
    """Return the share of the ranks' time spent working when each step waits for its slowest
    pack.
    """
    cost = pack_costs(packs, tokens, attention_tokens)
    steps = cost[: len(cost) // num_ranks * num_ranks].reshape(-1, num_ranks)
    return float(steps.mean(axis=1).sum() / steps.max(axis=1).sum())


def small_plan(num_clips: int = 60, seed: int = 0, run_length: int = 4, **settings: object):
    grids = np.random.default_rng(7).integers(1, [5, 5, 5], (num_clips, 3))
    packing = Packing(64, "4x8x8", 13, 64 * 64, (1, 2, 2), **settings)  # type: ignore[arg-type]
    return PackPlan(grids, packing, seed, run_length, "clips")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mixture_is_packed_almost_without_waste_and_ranks_wait_little(seed: int) -> None:
    grids = mixture(20_000, seed)
    one = plan_epoch(PackPlan(grids, PACKING, seed), 0)
    assert one.waste <= 0.005
    assert efficiency(one.packs, one.tokens, 8, PACKING.attention_tokens) >= 0.98
    assert 0.7 < padding_waste(grids) < 0.85  # the mixture is as hard as the one it follows
    assert one.packs.sums(one.tokens).max() <= TOKENS
    np.testing.assert_array_equal(np.sort(one.packs.clips), np.arange(len(grids)))


@pytest.mark.slow
def test_a_million_clips_are_planned_in_seconds() -> None:
    grids = mixture(1_000_000, 0)
    plan = PackPlan(grids, PACKING, 0)
    begun = time.process_time()
    one = plan_epoch(plan, 0)
    assert time.process_time() - begun <= 5
    assert one.waste <= 0.005
    assert efficiency(one.packs, one.tokens, 8, PACKING.attention_tokens) >= 0.98


def test_sorting_by_cost_is_what_keeps_the_ranks_together() -> None:
    plan = PackPlan(mixture(20_000, 0), PACKING, 0)
    tokens = plan.grids.prod(axis=1)
    packs = best_fit(tokens, np.random.default_rng(0).permutation(len(tokens)), TOKENS)
    packs = split_to_multiple(packs, tokens, 8)
    assert efficiency(packs, tokens, 8, PACKING.attention_tokens) < 0.93


def test_a_pack_is_as_full_as_the_clips_in_sight_allow() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 60, 200)
    order = rng.permutation(200)
    packs = best_fit(tokens, order, 64)
    left = Counter(order.tolist())
    for begin, end in zip(packs.offsets, packs.offsets[1:], strict=False):
        clips = packs.clips[begin:end].tolist()
        assert clips[0] == next(i for i in order.tolist() if left[i])  # the oldest is never passed
        left.subtract(clips)
        room = 64 - tokens[clips].sum()
        assert room >= 0
        assert all(tokens[i] > room for i in left if left[i])
    assert not any(left.values())
    with pytest.raises(ValueError, match="a clip of 65 tokens does not fit a pack of 64"):
        best_fit(np.array([3, 65]), np.arange(2), 64)


@pytest.mark.parametrize("num_clips", [1, 3, 5, 8, 9, 60, 300])
@pytest.mark.parametrize("run_length", [1, 4, 8])
def test_every_clip_has_its_turn_once_in_a_pass_on_any_number_of_ranks(
    num_clips: int, run_length: int
) -> None:
    plan = small_plan(num_clips, run_length=run_length)
    position = 0
    for number in range(3):
        one = plan.show(number)
        assert len(one.packs) % run_length == 0
        requests = [plan.batch(position + i) for i in range(len(one.packs))]
        position += len(one.packs)
        seen = Counter(p for r in requests for p in zip(r.clips, r.repeats, strict=True))
        repeats = range(number * plan.repeats_per_epoch, (number + 1) * plan.repeats_per_epoch)
        assert seen == Counter((clip, repeat) for clip in range(num_clips) for repeat in repeats)
        assert all(sum(r.kept) <= 64 for r in requests)
    assert plan.repeats_per_epoch == 1 or num_clips < run_length


def test_two_hundred_sets_of_few_clips_are_packed_whole() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        tokens = rng.choice([1, 7, 30, 64], rng.integers(1, 40))
        multiple = int(rng.integers(1, 9))
        packs = best_fit(tokens, rng.permutation(len(tokens)), 64)
        whole = split_to_multiple(packs, tokens, multiple)
        assert len(whole) % multiple == 0
        np.testing.assert_array_equal(np.sort(whole.clips), np.arange(len(tokens)))
        empty = int((np.diff(whole.offsets) == 0).sum())
        assert not empty or (np.diff(whole.offsets) <= 1).all()


def test_what_stands_at_a_position_depends_on_the_seed_alone() -> None:
    settings = {"resolution": UniformSide(16, 64), "dropping": BetaDropping(0.5, 0.8)}
    forwards = [small_plan(**settings).batch(i) for i in range(120)]
    plan = small_plan(**settings)
    assert [plan.batch(i) for i in reversed(range(120))] == forwards[::-1]
    assert [small_plan(seed=1, **settings).batch(i) for i in range(120)] != forwards
    later = small_plan(**settings)
    later.load_state_dict(plan.state_dict())
    assert later.batch(100) == forwards[100]
    assert len({len(plan.show(number).packs) for number in range(4)}) >= 1
    orders = {tuple(plan.show(number).packs.clips.tolist()) for number in range(4)}
    assert len(orders) == 4


def test_another_plan_has_another_fingerprint() -> None:
    plans = [
        small_plan(),
        small_plan(59),
        small_plan(seed=1),
        small_plan(attention_tokens=10),
        small_plan(dropping=BetaDropping(0.5, 0.5)),
        small_plan(resolution=UniformSide(16, 32)),
    ]
    assert len({plan.fingerprint for plan in plans}) == len(plans)
    assert small_plan(run_length=2).fingerprint == small_plan().fingerprint
    assert small_plan(run_length=2).with_run_length(4).batch(5) == small_plan().batch(5)


def test_packs_change_places_whole() -> None:
    packs = Packs(np.array([4, 2, 0, 3, 1]), np.array([0, 2, 2, 5]))
    again = packs.reordered(np.array([2, 0, 1]))
    assert again.clips.tolist() == [0, 3, 1, 4, 2]
    assert again.offsets.tolist() == [0, 3, 5, 5]
    assert packs.sums(np.arange(5) * 10).tolist() == [60, 0, 40]


def test_clips_of_few_shards_come_together() -> None:
    places = np.repeat(np.arange(40), 25)
    order = shuffled(np.random.default_rng(0), 1000, places)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    for start in range(0, 1000, 200):
        assert len(set(places[order[start : start + 200]])) == 8
    assert len(set(places[order[:20]])) > 3


@pytest.mark.parametrize(
    ("metadata", "duration_s", "expected"),
    [
        (VideoMetadata(40, 8, 64, 64), 5.0, "13x64x64"),
        (VideoMetadata(40, 8, 300, 300), 5.0, "13x64x64"),
        (VideoMetadata(40, 8, 128, 32), 5.0, "13x128x32"),
        (VideoMetadata(40, 8, 70, 20), 5.0, "13x64x16"),  # never upscaled
        (
            VideoMetadata(12, 24, 64, 64),
            0.5,
            "1x64x64",
        ),  # four frames at 8 a second: one, and four more
        (VideoMetadata(40, 24, 64, 64), 40 / 24, "13x64x64"),
        (VideoMetadata(1, 25, 50, 50), 0.04, "1x48x48"),
        (VideoMetadata(40, 8, 64, 15), 5.0, Removal.TOO_SMALL),
        (VideoMetadata(40, 4, 64, 64), 10.0, Removal.TOO_SLOW),
        (VideoMetadata(40, 8, 64, 64), -1.0, Removal.TOO_SHORT),
    ],
)
def test_a_clip_keeps_its_aspect_ratio_and_length(
    metadata: VideoMetadata, duration_s: float, expected: object
) -> None:
    size = NativeSizes(SMALL, 8.0).nearest(metadata, duration_s)
    assert size == expected if isinstance(expected, Removal) else str(size) == expected


def test_any_clip_fits_the_budget_and_stays_within_its_metadata() -> None:
    rng = np.random.default_rng(0)
    rule = NativeSizes(PACKING, 16.0)
    for _ in range(500):
        frames, height, width = (int(x) for x in rng.integers([1, 16, 16], [900, 1200, 2200]))
        metadata = VideoMetadata(frames, 30.0, height, width)
        size = rule.nearest(metadata, metadata.duration_s)
        assert isinstance(size, VideoSize)
        assert np.prod(PACKING.grid(*vars(size).values())) <= TOKENS
        assert size.height <= height
        assert size.width <= width
        assert size.num_frames == 1 or (size.num_frames - 1) / 16 < metadata.duration_s
        assert size.height * size.width <= LARGEST_AREA
        fit = min(1.0, np.sqrt(LARGEST_AREA / (height * width)))
        assert height * fit - size.height < 16 + 1e-6
        assert width * fit - size.width < 16 + 1e-6


def test_resolutions_are_drawn_within_their_range_and_never_upwards() -> None:
    grids = np.tile(np.array([[3, 16, 16], [1, 2, 8]]), (5000, 1))
    packing = Packing(1024, "4x8x8", 9, 256 * 256, resolution=UniformSide(64, 256))
    drawn, tokens = shown(grids, packing, np.random.default_rng(0), 0)
    assert (drawn <= grids).all()
    assert (drawn >= 1).all()
    np.testing.assert_array_equal(tokens, drawn.prod(axis=1))
    sides = drawn[::2, 1] * 16
    assert 64 <= sides.min() <= 72
    assert abs(sides.mean() - 152) < 4  # even over [64, 256], cut down to whole tokens
    assert (drawn[:, 0] == grids[:, 0]).all()
    rng = np.random.default_rng(0)
    normal: Resolution = NormalSide(64, 384)
    assert 64 <= (sides := normal.sides(rng, 20_000)).min() <= sides.max() <= 384
    assert sides.mean() < 224 < UniformSide(64, 384).sides(rng, 20_000).mean() + 3


def test_dropping_follows_its_distribution() -> None:
    rng = np.random.default_rng(0)
    tokens = np.full(50_000, 100)
    rates = BetaDropping(0.4, 0.9).rates(rng, tokens, 0)
    assert rates.mean() / 0.9 == pytest.approx(0.4, abs=0.005)
    assert rates.var() / 0.81 == pytest.approx(0.3 * 0.4 * 0.6, rel=0.03)
    by_length = LengthDropping(0.1, 0.7, 100)
    for length, mean in ((0, 0.1), (50, 0.4), (100, 0.7), (300, 0.7)):
        rates = by_length.rates(rng, np.full(20_000, length), 0)
        assert rates.mean() == pytest.approx(mean, abs=0.002)
        assert rates.std() == pytest.approx(0.02, rel=0.05)
    schedule = ScheduledDropping(0.8, 0.2, 1000, 100)
    rates = schedule.rates(rng, np.ones(2001), 0)
    assert rates[[0, 1000, 2000]] == pytest.approx([0.8, 0.5, 0.2], abs=1e-3)
    assert (np.diff(rates) < 0).all()
    np.testing.assert_array_equal(schedule.rates(rng, np.ones(1), 1000), rates[1000])


def test_at_least_one_token_of_a_clip_is_kept_and_none_is_invented() -> None:
    grids = np.random.default_rng(0).integers(1, 5, (1000, 3))
    packing = Packing(64, "4x8x8", 13, 64 * 64, dropping=BetaDropping(0.9, 0.99))
    drawn, kept = shown(grids, packing, np.random.default_rng(1), 0)
    np.testing.assert_array_equal(drawn, grids)
    assert (kept >= 1).all()
    assert (kept <= grids.prod(axis=1)).all()


def test_cost_counts_attention() -> None:
    costs = clip_costs(np.array([6912, 100]), 6912)
    assert costs[0] == 2 * 6912
    assert costs[1] < 102


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((63, "4x8x8", 13, 64 * 64), "tokens = 63: a clip of max_frames = 13 .* takes 64"),
        ((64, "8x8", 13, 64 * 64), "'8x8' is not a video size"),
        ((64, "4x8x8", 4, 255), "max_pixels = 255: a token covers 16x16"),
        ((64, "4x8x8", 4, 4096, (2, 2, 2)), "max_frames = 4: a token needs 5 frames"),
        ((64, "4x8x8", 13, 4096, (0, 2, 2)), "patch = "),
        ((64, "4x8x8", 13, 4096, (1, 2, 2), None, None, 0), "attention_tokens = 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Packing(*settings)


@pytest.mark.parametrize(
    ("part", "arguments", "message"),
    [
        (UniformSide, (0, 5), "smallest = 0"),
        (NormalSide, (64, 32), "largest = 32"),
        (NormalSide, (64, 128, 0.0, 0.0), "std = 0"),
        (BetaDropping, (1.0, 0.5), r"mean = 1\.0"),
        (LengthDropping, (0.1, 1.0, 5), r"highest = 1\.0: must lie in \[0, 1\)"),
        (LengthDropping, (0.1, 0.2, 0), "longest = 0"),
        (ScheduledDropping, (0.8, 0.2, 10, 0), "width = 0"),
    ],
)
def test_distributions_that_cannot_be_drawn_from_are_refused(
    part: type, arguments: tuple, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        part(*arguments)
