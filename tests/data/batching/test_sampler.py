"""Order depends on seed and position alone, and a stopped run resumes with the next batch."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import Dataset

from sora_lightning.data.batching.sampler import (
    BatchPlan,
    BatchRequest,
    BatchStream,
    FixedBatches,
    StreamLoader,
    WindowBatches,
    shuffled,
)
from sora_lightning.data.settings import Batching
from sora_lightning.types import VideoSize

SIZES = [VideoSize(17, 32, 32), VideoSize(17, 24, 40), VideoSize(1, 64, 64)]
NUM_CLIPS = dict(zip(SIZES, (50, 23, 3), strict=True))
BATCH_SIZES = dict(zip(SIZES, (8, 5, 7), strict=True))


def plan(seed: int = 0, run_length: int = 4, identity: str = "") -> BatchPlan:
    return BatchPlan(NUM_CLIPS, BATCH_SIZES, seed, run_length, identity)


class Requests(Dataset):
    """Gives requests back, so that a test sees what a worker was asked for."""

    def __len__(self) -> int:
        return sum(NUM_CLIPS.values())

    def __getitem__(self, request: BatchRequest) -> BatchRequest:
        return request


def loader(
    num_workers: int = 0, rank: int = 0, num_ranks: int = 1, steps: int = 6, **settings: int
) -> StreamLoader:
    stream = BatchStream(plan(**settings), rank, num_ranks, steps)
    return StreamLoader(Requests(), stream, num_workers, persistent_workers=num_workers > 0)


def test_every_clip_is_shown_once_in_an_epoch_of_its_size() -> None:
    one = plan()
    seen: dict[VideoSize, list[tuple[int, int]]] = {size: [] for size in SIZES}
    for position in range(300):
        batch = one.batch(position)
        assert len(batch.clips) == BATCH_SIZES[batch.size]
        seen[batch.size] += zip(batch.repeats, batch.clips, strict=True)
    for size, shown in seen.items():
        epochs = Counter(repeat for repeat, _ in shown)
        assert [repeat for repeat, _ in shown] == sorted(repeat for repeat, _ in shown)
        for number in range(max(epochs)):  # the last epoch is not over
            clips = [clip for repeat, clip in shown if repeat == number]
            assert sorted(clips) == list(range(NUM_CLIPS[size]))
        orders = {tuple(clip for repeat, clip in shown if repeat == n) for n in range(max(epochs))}
        assert len(orders) > 1


def test_sizes_take_turns_in_proportion_to_their_clips() -> None:
    one = plan()
    num_passes = 60
    shown = Counter[VideoSize]()
    for position in range(num_passes * 12):
        batch = one.batch(position)
        shown[batch.size] += len(batch.clips)
    total = sum(shown.values())
    for size, clips in NUM_CLIPS.items():
        slack = one.run_length * BATCH_SIZES[size]
        assert abs(shown[size] - total * clips / sum(NUM_CLIPS.values())) <= 2 * slack


def test_a_batch_is_the_same_whenever_it_is_asked_for() -> None:
    forwards = [plan().batch(i) for i in range(150)]
    one = plan()
    assert [one.batch(i) for i in reversed(range(150))] == forwards[::-1]
    assert [plan(seed=1).batch(i) for i in range(150)] != forwards
    far = plan().batch(10**7)
    assert far == plan().batch(10**7)


def test_all_ranks_work_on_one_size_in_a_step_and_share_what_one_would_do() -> None:
    alone = [plan().batch(i) for i in range(48)]
    for num_ranks in (2, 4):
        ranks = [list(loader(rank=r, num_ranks=num_ranks, steps=12)) for r in range(num_ranks)]
        steps = list(zip(*ranks, strict=True))
        assert all(len({batch.size for batch in step}) == 1 for step in steps)
        assert [batch for step in steps for batch in step] == alone[: 12 * num_ranks]


def test_one_small_set_fills_its_batches_from_several_passes() -> None:
    tiny = BatchPlan({SIZES[0]: 3}, {SIZES[0]: 8}, seed=0)
    first = tiny.batch(0)
    assert len(first.clips) == 8
    assert first.repeats == (0, 0, 0, 1, 1, 1, 2, 2)
    assert set(first.clips[:3]) == set(first.clips[3:6]) == {0, 1, 2}
    assert tiny.batches_per_epoch == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 0), (1, 2)), ((1, 2), (1, 0)), ((2, 0), (1, 0)), ((1, 0), (2, 2)), ((4, 0), (2, 0))],
    ids=str,
)
@pytest.mark.parametrize("stop", [4, 6, 8])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(
    before: tuple[int, int], after: tuple[int, int], stop: int
) -> None:
    """(ranks, workers) before and after; the stop is within, at the end of, and after an epoch."""
    whole = [plan().batch(i) for i in range(100)]
    first = [loader(before[1], rank, before[0]) for rank in range(before[0])]
    for one in first:
        taken = 0
        while taken < stop:
            for _ in one:
                taken += 1
                if taken == stop:
                    break
    states = [one.state_dict() for one in first]
    assert all(state == states[0] for state in states)
    position = stop * before[0]
    second = [
        loader(after[1], rank, after[0], steps=5, run_length=after[0]) for rank in range(after[0])
    ]
    for one in second:
        one.load_state_dict(states[0])
    rest = [batch for step in zip(*second, strict=True) for batch in step]
    assert rest == whole[position : position + 5 * after[0]]


def test_what_workers_have_prefetched_does_not_count() -> None:
    one = loader(num_workers=2)
    batches = iter(one)
    next(batches), next(batches)
    assert one.state_dict()["position"] == 2
    del batches
    assert next(iter(one)) == plan().batch(2)


class Logged(Requests):
    """Writes a line for each request."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getitem__(self, request: BatchRequest) -> BatchRequest:
        with self.path.open("a") as file:
            file.write(f"{request}\n")
        return request


def test_workers_go_on_with_the_next_epoch_while_one_ends(tmp_path: Path) -> None:
    """Two batches ahead; what they have ready is served, unless another position is loaded."""
    log, one = tmp_path / "log.txt", plan()
    stream = BatchStream(one, 0, 1, 6)
    batches = StreamLoader(Logged(log), stream, 1, persistent_workers=True)

    def asked(num: int) -> list[str]:
        deadline = time.monotonic() + 20
        while log.read_text().count("\n") < num and time.monotonic() < deadline:
            time.sleep(0.02)
        return log.read_text().splitlines()

    assert list(batches) == [one.batch(n) for n in range(6)]
    assert asked(8) == [str(one.batch(n)) for n in range(8)]
    assert list(batches) == [one.batch(n) for n in range(6, 12)]
    assert asked(14) == [str(one.batch(n)) for n in range(14)]
    batches.load_state_dict({**batches.state_dict(), "position": 4})
    assert list(batches) == [one.batch(n) for n in range(4, 10)]
    assert len(asked(22)) == 22
    batches.load_state_dict({**batches.state_dict(), "run_length": 2})
    assert list(batches) == [plan(run_length=2).batch(n) for n in range(10, 16)]
    assert len(asked(30)) == 30  # those that were ready were of the runs before


@pytest.mark.parametrize("num_clips", [5, 40_000])
def test_clips_of_eight_shards_at_a_time_keep_the_order_that_they_were_drawn_in(
    num_clips: int,
) -> None:
    places = np.random.default_rng(0).integers(0, 90, num_clips).astype(np.int8)
    found = shuffled(np.random.default_rng(1), num_clips, places)
    again = np.random.default_rng(1)
    ranks = again.permutation(int(places.max()) + 1) // 8
    drawn = again.permutation(num_clips)
    expected = drawn[np.argsort(ranks[places[drawn]], kind="stable")]
    np.testing.assert_array_equal(found, expected)


def test_more_ranks_than_before_repeat_less_than_a_step() -> None:
    state = {**loader().state_dict(), "position": 7}
    one = loader(num_ranks=4)
    one.load_state_dict(state)
    assert one.sampler.position == 4


def test_another_set_of_clips_is_refused_on_resume() -> None:
    state = StreamLoader(Requests(), BatchStream(plan(identity="a"), 0, 1, None), 0).state_dict()
    other = StreamLoader(Requests(), BatchStream(plan(identity="b"), 0, 1, None), 0)
    with pytest.raises(ValueError, match="other clips"):
        other.load_state_dict(state)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="run_length = 0"):
        Batching(run_length=0)
    with pytest.raises(ValueError, match="run_length = 4: must be a multiple of the 3 ranks"):
        BatchStream(plan(), 0, 3, None)
    with pytest.raises(ValueError, match="steps_per_epoch = 0"):
        Batching(steps_per_epoch=0)


def test_an_epoch_is_a_pass_by_default() -> None:
    batches = 50 / 8 + 23 / 5 + 3 / 7
    assert len(BatchStream(plan(), 0, 1, None)) == int(batches) + 1
    assert len(BatchStream(plan(), 0, 4, None)) == 3
    assert len(BatchStream(plan(), 0, 1, 100)) == 100


def test_given_batches_are_dealt_out_once() -> None:
    batches = [plan().batch(i) for i in range(7)]
    ranks = [list(FixedBatches(batches, rank, 2)) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [4, 3]
    assert [ranks[i % 2][i // 2] for i in range(7)] == batches


def test_batches_of_windows_are_cut_from_each_size_in_turn() -> None:
    small, large = VideoSize(1, 8, 8), VideoSize(1, 16, 16)
    windows = {
        small: np.array([0, 1, 3, 4, 9]),
        large: np.arange(4),
        VideoSize(1, 8, 16): np.arange(0),
    }
    batches = WindowBatches(windows, {small: 2, large: 4, VideoSize(1, 8, 16): 9}, num_windows=3)
    expected = [
        BatchRequest(small, (0, 0), (0, 1)),
        BatchRequest(small, (1, 1), (0, 1)),
        BatchRequest(small, (3,), (0,)),
        BatchRequest(large, (0, 0, 0, 1), (0, 1, 2, 0)),
    ]
    assert list(batches) == batches[:] == expected
    assert batches[:2] == expected[:2]
    assert [batches[number] for number in range(4)] == expected
    with pytest.raises(IndexError):
        batches[4]
    assert not len(WindowBatches({}, {}, 1))
