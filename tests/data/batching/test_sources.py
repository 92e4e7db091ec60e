"""Clips and their sources are read at the same times, cut alike, cached apart, and left out
together.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor

from sora_lightning.data import (
    ClipRecord,
    DecodeError,
    LatentCache,
    PyAVReader,
    VideoDataModule,
    read_manifest,
    write_dataset,
    write_shards,
    write_video,
)
from sora_lightning.data.batching.clip_reader import ClipReader
from sora_lightning.data.batching.native_sizes import Packing
from sora_lightning.data.batching.sources import PairKeys, SourceReader
from sora_lightning.data.manifest.index import index
from sora_lightning.data.manifest.split import split
from sora_lightning.types import VideoBatch, VideoSize
from tests.data.barcodes import BITS, ROWS, STRIPE, numbers_in
from tests.data.modules import data_module
from tests.data.test_datamodule import Recorder, encode, trainer

SIZE = VideoSize(5, ROWS, BITS * STRIPE)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_dataset(tmp_path_factory.mktemp("pairs"), 8, 3, 0, edits=True)


def module(manifests: dict[str, Path], **settings: object) -> VideoDataModule:
    options = {"sizes": ["9x16x16", "9x12x20"], "pixels_per_batch": 4 * 9 * 16 * 16}
    return data_module(manifests["train"], **{**options, "sources": True, **settings})  # type: ignore[arg-type]


def frames_of(video: Tensor) -> np.ndarray:
    return rearrange((video.numpy() + 1) * 127.5, "c F H W -> F H W c")


def test_a_source_is_read_at_the_times_of_its_clip(barcodes: Callable[..., Path]) -> None:
    """The source's own frame rate and length do not matter."""
    clip = barcodes("clip.mp4", list(range(0, 61 * 40, 40)))  # 25 frames per second
    source = barcodes("source.mp4", list(range(0, 200 * 20, 20)))  # 50, and longer
    record = ClipRecord(clip, ("make it so",), "0" * 16, source=source)
    reader = ClipReader(PyAVReader(), 5.0)
    for window in (0.0, 0.37, 1.0):
        times_s = reader.locate(record, SIZE, window)[2]
        numbers = numbers_in(frames_of(SourceReader(reader).read(record, SIZE, window)))
        np.testing.assert_array_equal(numbers, np.floor(times_s / 0.02 + 0.01))
        shown = numbers_in(frames_of(reader.read(record, SIZE, window)))
        assert [number // 2 for number in numbers] == shown


def test_a_source_that_ends_too_early_is_no_source(barcodes: Callable[..., Path]) -> None:
    clip = barcodes("clip.mp4", list(range(0, 61 * 40, 40)))
    source = barcodes("source.mp4", list(range(0, 20 * 40, 40)))
    record = ClipRecord(clip, ("make it so",), "0" * 16, source=source)
    reader = SourceReader(ClipReader(PyAVReader(), 25.0))
    assert numbers_in(frames_of(reader.read(record, SIZE, 0.0))) == [0, 1, 2, 3, 4]
    with pytest.raises(DecodeError, match=r"source\.mp4: ends after 0\.800 s, .*clip\.mp4 goes on"):
        reader.read(record, SIZE, 0.5)


def test_a_source_is_cut_as_its_clip_and_other_proportions_are_refused(tmp_path: Path) -> None:
    """A source twice as large shows the same part; a wider one would be cropped elsewhere."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (6, 10, 20, 3), np.uint8)
    small, large = (coarse.repeat(n, 1).repeat(n, 2) for n in (4, 8))
    write_video(tmp_path / "clip.mp4", small, 8.0, crf=0)
    write_video(tmp_path / "source.mp4", large, 8.0, crf=0)
    write_video(tmp_path / "wide.mp4", large[:, :72], 8.0, crf=0)
    reader, size = ClipReader(PyAVReader(), 8.0), VideoSize(5, 32, 32)
    record = ClipRecord(tmp_path / "clip.mp4", ("x",), "0" * 16, source=tmp_path / "source.mp4")
    clip, source = (one.read(record, size, 0.5) for one in (reader, SourceReader(reader)))
    assert (clip - source).abs().mean() < 0.05
    assert (clip - source.roll(4, 3)).abs().mean() > 0.2
    wide = ClipRecord(tmp_path / "clip.mp4", ("x",), "0" * 16, source=tmp_path / "wide.mp4")
    with pytest.raises(DecodeError, match=r"wide\.mp4: frames of 72x160 have not the proportions"):
        SourceReader(reader).read(wide, size, 0.5)


def test_pairs_show_one_scene_before_and_after(pairs: dict[str, Path]) -> None:
    """A batch's source has the batch's sizes, and differs from it where the shape is."""
    data = module(pairs)
    data.setup("fit")
    for batch in data.train_dataloader():
        assert batch.source.pixels.shape == batch.pixels.shape
        assert batch.source.clip_ids == batch.clip_ids
        corners = (batch.pixels - batch.source.pixels)[:, :, :, :1, :1].abs()
        assert corners.max() < 0.1  # the background is one
        assert (batch.pixels - batch.source.pixels).abs().amax((1, 2, 3, 4)).min() > 0.2
        moved = batch.to(torch.float64)
        assert moved.source.pixels.dtype == torch.float64


class Encoder(Recorder):
    def predict_step(
        self, batch: VideoBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> tuple[list[str], Tensor]:
        return batch.clip_ids, encode(batch.pixels)


def write_cache(data: VideoDataModule, root: Path) -> None:
    loaders = trainer(root.parent).predict(Encoder(), data)
    with LatentCache.create(root, "tokenizer-a", "float32") as cache:
        for keys, latents in [batch for batches in loaders or [] for batch in batches]:
            for key, value in zip(keys, latents, strict=True):
                cache.write(key, value)


def test_the_cache_serves_the_latents_of_clips_and_sources(
    pairs: dict[str, Path], tmp_path: Path
) -> None:
    settings = {"val_manifest": pairs["val"], "windows_per_clip": 2, "fixed_windows": True}
    write_cache(module(pairs, **settings), tmp_path / "latents")
    assert len(LatentCache.open(tmp_path / "latents")) == 2 * 2 * 11
    pixels = module(pairs, **settings)
    cached = module(pairs, **settings, latents=tmp_path / "latents")
    without = module(pairs, **settings, latents=tmp_path / "latents", sources=False)
    for data in (pixels, cached, without):
        data.setup("fit")
    loaders = (one.train_dataloader() for one in (pixels, cached, without))
    for by_pixels, by_cache, alone in zip(*loaders, strict=True):
        assert by_cache.clip_ids == by_pixels.clip_ids
        torch.testing.assert_close(by_cache.latents, encode(by_pixels.pixels))
        torch.testing.assert_close(by_cache.source.latents, encode(by_pixels.source.pixels))
        assert torch.equal(alone.latents, by_cache.latents)
        assert alone.source is None


def copied(pairs: dict[str, Path], folder: Path) -> list[dict]:
    """The training rows, with copies of their files."""
    rows = [json.loads(line) for line in pairs["train"].read_text().splitlines()]
    for row in rows:
        for key in ("path", "source"):
            content = (pairs["train"].parent / row[key]).read_bytes()
            row[key] = Path(row[key]).name
            (folder / row[key]).write_bytes(content)
    return rows


def written(rows: list[dict], folder: Path) -> dict[str, Path]:
    (folder / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"train": folder / "clips.jsonl"}


def test_like_clips_of_other_sources_keep_each_its_own(
    pairs: dict[str, Path], tmp_path: Path
) -> None:
    """Two edits with one outcome have one window of the clip in the cache, and two of sources."""
    row = copied(pairs, tmp_path)[0]
    (tmp_path / "twin.mp4").write_bytes((tmp_path / row["path"]).read_bytes())
    manifests = written([row, {**row, "path": "twin.mp4", "source": row["path"]}], tmp_path)
    write_cache(module(manifests), tmp_path / "latents")
    assert len(LatentCache.open(tmp_path / "latents")) == 3
    pixels = module(manifests, fixed_windows=True)
    cached = module(manifests, latents=tmp_path / "latents")
    for data in (pixels, cached):
        data.setup("fit")
    loaders = (pixels.train_dataloader(), cached.train_dataloader())
    for by_pixels, by_cache in zip(*loaders, strict=True):
        assert by_cache.clip_ids == by_pixels.clip_ids
        torch.testing.assert_close(by_cache.source.latents, encode(by_pixels.source.pixels))


def test_a_window_is_served_where_both_clip_and_source_are_cached(
    pairs: dict[str, Path], tmp_path: Path
) -> None:
    """One of three windows of the clip or of the source is missing; pairs share a window."""
    data = module(pairs, windows_per_clip=3)
    loaders = trainer(tmp_path).predict(Encoder(), data) or []
    both = [{k: v for b in batches for k, v in zip(*b, strict=True)} for batches in loaders]
    gone = {key for part, first in zip(both, (0, 1), strict=True) for key in list(part)[first::4]}
    with LatentCache.create(tmp_path / "latents", "tokenizer-a", "float32") as cache:
        for key, value in [pair for part in both for pair in part.items() if pair[0] not in gone]:
            cache.write(key, value)
    cached = module(pairs, windows_per_clip=3, latents=tmp_path / "latents")
    cached.setup("fit")
    there: dict[str, list[tuple[Tensor, Tensor]]] = {}
    keys = PairKeys(8.0, 3)
    for size, records in cached.check()[pairs["train"]].clips.items():
        for record in records:
            named = [(keys(record, size, w), keys.of_source(record, size, w)) for w in range(3)]
            there[record.clip_id] = [
                (both[0][key], both[1][of_source])
                for key, of_source in named
                if not {key, of_source} & gone
            ]
    for batch in itertools.chain(cached.train_dataloader(), cached.train_dataloader()):
        for name, *served in zip(batch.clip_ids, batch.latents, batch.source.latents, strict=True):
            assert any(all(map(torch.equal, served, pair)) for pair in there[name])


def test_a_source_that_changed_since_it_was_encoded_is_left_out(
    pairs: dict[str, Path], tmp_path: Path
) -> None:
    manifests = written(copied(pairs, tmp_path), tmp_path)
    write_cache(module(manifests), tmp_path / "latents")
    with (tmp_path / "00003-source.mp4").open("ab") as file:
        file.write(b"x")
    data = module(manifests, latents=tmp_path / "latents")
    with pytest.raises(ValueError, match="lacks the latents of 1 of 8"):
        data.setup("fit")
    module(manifests, latents=tmp_path / "latents", sources=False).setup("fit")


def test_a_clip_whose_source_cannot_be_read_is_bad(pairs: dict[str, Path], tmp_path: Path) -> None:
    manifests = written(copied(pairs, tmp_path), tmp_path)
    (tmp_path / "00002-source.mp4").write_bytes(b"no video")
    recorder = Recorder()
    trainer(tmp_path / "run", max_steps=6).fit(recorder, module(manifests, max_bad_share=0.2))
    bad = read_manifest(manifests["train"])[2].clip_id
    assert bad not in {name for ids, _, _ in recorder.fed for name in ids}
    (line,) = (tmp_path / "run" / "bad_clips.jsonl").read_text().splitlines()
    assert json.loads(line)["clip_id"] == bad
    assert "00002-source.mp4" in json.loads(line)["reason"]


def test_a_manifest_without_sources_is_refused_where_they_are_asked_for_alone(
    pairs: dict[str, Path], tmp_path: Path
) -> None:
    rows = copied(pairs, tmp_path)
    for source, said in (
        (
            None,
            r"jsonl: source is missing in the row of 00001\.mp4: data\.reading\.sources = true",
        ),
        ("a stock library", r"clips\.jsonl: source = 'a stock library': no such file"),
    ):
        rows[1]["source"] = source
        manifests = written(rows, tmp_path)
        module(manifests, sources=False).setup("fit")
        with pytest.raises(ValueError, match=said):
            module(manifests).setup("fit")


def test_packs_with_sources_are_refused(pairs: dict[str, Path]) -> None:
    packing = Packing(64, "4x8x8", 9, 1024)
    with pytest.raises(ValueError, match="packing and sources are both given"):
        module(pairs, packing=packing, sizes=None, pixels_per_batch=None)


def test_manifests_that_move_take_their_sources_along(
    pairs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "clips").mkdir()
    rows = copied(pairs, tmp_path / "clips")
    rows[0]["source"] = "a stock library"
    manifest = written(rows, tmp_path / "clips")["train"]
    (tmp_path / "there").mkdir()
    index(manifest, tmp_path / "there" / "indexed.jsonl", num_workers=1)
    split(manifest, tmp_path / "there", 2)
    shards = write_shards(manifest, tmp_path / "shards")
    train, test, indexed, sharded = (
        read_manifest(path, root=str(tmp_path / "clips"))
        for path in (*(tmp_path / f"there/{n}.jsonl" for n in ("train", "test", "indexed")), shards)
    )
    for records in (indexed, sharded, train + test):
        there = [record for record in records if record.source.is_file()]
        assert len(there) == 7
        assert {r.source.resolve() for r in there} == {
            (tmp_path / "clips" / row["source"]).resolve() for row in rows[1:]
        }
        assert {r.columns["source"] for r in records if r not in there} == {"a stock library"}
    with pytest.raises(
        ValueError, match=r"clips\.jsonl:2: source = '00001-source\.mp4': the copies"
    ):
        index(manifest, tmp_path / "again.jsonl", reencode_to=tmp_path / "copies", num_workers=1)
