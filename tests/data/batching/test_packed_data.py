"""Packs of the DataModule: every clip once, at its own size, and the same after any
stop, with any number of workers and on any number of ranks.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from sora_lightning.data import LatentCache, Packing, VideoDataModule, read_manifest
from sora_lightning.data.batching.native_sizes import BetaDropping, UniformSide
from sora_lightning.data.batching.sampler import StreamLoader
from sora_lightning.types import PackedBatch, VideoBatch
from tests.data.modules import data_module
from tests.data.test_datamodule import Recorder, encode, trainer, with_bad_clips

TOKENS = 26


def packing(**settings: object) -> Packing:
    return Packing(TOKENS, "4x4x4", 17, 32 * 40, (1, 4, 4), **settings)  # type: ignore[arg-type]


def module(manifest: Path, settings: dict | None = None, **options: object) -> VideoDataModule:
    data = data_module(manifest, fps=8.0, packing=packing(**settings or {}), **options)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def loader(data: VideoDataModule, rank: int = 0, num_ranks: int = 1) -> StreamLoader:
    class Place:
        distributed_sampler_kwargs = {"rank": rank, "num_replicas": num_ranks}  # noqa: RUF012
        log_dir = default_root_dir = "unused"

    data.trainer = Place()  # type: ignore[assignment]
    return data.train_dataloader()


def seen(batch: PackedBatch) -> tuple:
    videos = [(tuple(v.shape), float(v.double().sum())) for v in batch.videos or []]
    kept = None if batch.kept is None else [k.tolist() for k in batch.kept]
    return batch.clip_ids, batch.repeats, batch.captions, videos, kept


def test_a_pass_shows_every_clip_once_at_its_own_size(shapes: dict[str, Path]) -> None:
    data = module(shapes["train"])
    batches = list(loader(data))
    records = {r.clip_id: r.metadata for r in read_manifest(shapes["train"])}
    assert Counter(i for b in batches for i in b.clip_ids) == Counter(list(records))
    different = set()
    for batch in batches:
        videos = batch.videos or []
        tokens = sum(((v.shape[1] - 1) // 4 + 1) * v.shape[2] * v.shape[3] // 256 for v in videos)
        assert tokens <= TOKENS
        assert batch.fill == tokens / TOKENS
        assert batch.kept is None
        for name, video in zip(batch.clip_ids, videos, strict=True):
            metadata = records[name]
            assert metadata is not None
            different.add(tuple(video.shape))
            scale = min(1.0, (32 * 40 / (metadata.height * metadata.width)) ** 0.5)
            for axis, side in ((2, metadata.height), (3, metadata.width)):
                assert video.shape[axis] <= side * scale + 1e-6 < video.shape[axis] + 16
            assert video.abs().max() <= 1
    assert len(different) > 1


@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 0), (1, 2)), ((1, 2), (1, 0)), ((2, 0), (2, 0)), ((2, 2), (1, 0)), ((1, 0), (2, 0))],
    ids=str,
)
def test_a_stopped_run_goes_on_with_the_same_packs(
    before: tuple[int, int], after: tuple[int, int], stop: int, shapes: dict[str, Path]
) -> None:
    """(ranks, workers) before and after: shapes, pixels, captions and kept tokens to the bit."""
    settings = {"resolution": UniformSide(16, 32), "dropping": BetaDropping(0.4, 0.8)}
    whole = [
        seen(batch)
        for batch in loader(module(shapes["train"], settings, steps_per_epoch=2 * stop + 8))
    ]
    first = []
    for rank in range(before[0]):
        data = module(shapes["train"], settings, num_workers=before[1], steps_per_epoch=9)
        one = loader(data, rank, before[0])
        batches = iter(one)
        first.append([seen(next(batches)) for _ in range(stop)])
        state = one.state_dict()
        del batches
    place = stop * before[0]
    assert [b for step in zip(*first, strict=True) for b in step] == whole[:place]
    second = []
    for rank in range(after[0]):
        data = module(shapes["train"], settings, num_workers=after[1], steps_per_epoch=2)
        one = loader(data, rank, after[0])
        one.load_state_dict(json.loads(json.dumps(state)))
        second.append([seen(batch) for batch in one])
    begin = place // after[0] * after[0]
    rest = [b for step in zip(*second, strict=True) for b in step]
    assert rest == whole[begin : begin + len(rest)]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_all_ranks_together_see_each_clip_once_in_an_epoch(
    num_ranks: int, shapes: dict[str, Path]
) -> None:
    names = {r.clip_id for r in read_manifest(shapes["train"])}
    ranks = [list(loader(module(shapes["train"]), rank, num_ranks)) for rank in range(num_ranks)]
    assert len({len(batches) for batches in ranks}) == 1
    assert Counter(i for r in ranks for b in r for i in b.clip_ids) == Counter(names)


def test_resolutions_and_dropping_change_from_pass_to_pass(shapes: dict[str, Path]) -> None:
    settings = {"resolution": UniformSide(16, 40), "dropping": BetaDropping(0.4, 0.8)}
    data = module(shapes["train"], settings, steps_per_epoch=40)
    shown: dict[str, set] = {}
    for batch in loader(data):
        for name, video, kept in zip(
            batch.clip_ids, batch.videos or [], batch.kept or [], strict=True
        ):
            total = ((video.shape[1] - 1) // 4 + 1) * video.shape[2] * video.shape[3] // 256
            assert 1 <= len(kept) <= total
            assert kept.max() < total
            assert (kept.diff() > 0).all()
            shown.setdefault(name, set()).add((tuple(video.shape), tuple(kept.tolist())))
    assert sum(len(views) > 1 for views in shown.values()) > len(shown) / 2


def test_a_clip_that_cannot_be_read_is_left_out_of_its_pack(
    shapes: dict[str, Path], tmp_path: Path
) -> None:
    manifest = with_bad_clips(shapes, tmp_path, declared=True)
    data = data_module(manifest, packing=packing(), run_length=1, max_bad_share=0.5, root="/")
    records = {r.clip_id: r.path.name for r in read_manifest(manifest, root="/")}

    class Packs(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.fed: list[PackedBatch] = []

        def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
            self.fed.append(batch)
            return self.weight * 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    packs = Packs()
    trainer(tmp_path / "run", max_steps=30).fit(packs, data)
    used = {records[name] for batch in packs.fed for name in batch.clip_ids}
    assert used.isdisjoint({"text.mp4", "cut.mp4"})
    assert used == {f"{i:05d}.mp4" for i in range(6)}
    lines = (tmp_path / "run" / "bad_clips.jsonl").read_text().splitlines()
    assert {Path(json.loads(line)["path"]).name for line in lines} == {"text.mp4", "cut.mp4"}


def test_the_cache_serves_the_latents_of_the_same_pixels(
    shapes: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "latents"
    data = data_module(shapes["train"], packing=packing())
    written = trainer(tmp_path).predict(Recorder(), data)
    with LatentCache.create(root, "tokenizer-a", "float32") as cache:
        for keys, latents in written or []:
            for key, value in zip(keys, latents, strict=True):
                cache.write(key, value)
    pixels = module(shapes["train"], fixed_windows=True)
    cached = module(shapes["train"], latents=root)
    for a, b in zip(loader(pixels), loader(cached), strict=True):
        assert (a.clip_ids, a.repeats, a.captions) == (b.clip_ids, b.repeats, b.captions)
        assert b.videos is None
        for video, latents in zip(a.videos or [], b.latents or [], strict=True):
            torch.testing.assert_close(encode(video[None])[0], latents)


def test_validation_and_predict_see_one_size_at_a_time(shapes: dict[str, Path]) -> None:
    data = data_module(shapes["train"], packing=packing(), val_manifest=shapes["val"])
    data.setup("fit")
    (validation,) = [data.val_dataloader()]
    batches = list(validation)  # type: ignore[arg-type]
    assert all(isinstance(batch, VideoBatch) for batch in batches)
    names = Counter(name for batch in batches for name in batch.clip_ids)
    assert names == Counter(r.clip_id for r in read_manifest(shapes["val"]))
    for batch in batches:
        b, _, frames, height, width = batch.video.shape
        assert b * ((frames - 1) // 4 + 1) * height * width // 256 <= TOKENS


def test_other_packs_are_refused_on_resume(shapes: dict[str, Path]) -> None:
    state = loader(module(shapes["train"])).state_dict()
    with pytest.raises(ValueError, match="other clips"):
        loader(module(shapes["train"], {"dropping": BetaDropping(0.4, 0.8)})).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": packing(), "sizes": ["17x32x32"]}, "sizes and packing are both given"),
        ({"packing": packing(), "pixels_per_batch": 5}, "pixels_per_batch and packing"),
        ({"sizes": ["17x32x32"]}, "pixels_per_batch is missing"),
        ({"pixels_per_batch": 5}, "sizes is missing"),
        ({"packing": packing(), "run_length": 0}, "run_length = 0"),
        (
            {"packing": packing(resolution=UniformSide(16, 32)), "latents": Path("x")},
            "packing.resolution draws another size",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data_module(Path("never read"), **settings)
