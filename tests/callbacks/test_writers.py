"""A cache of latents is gone on with where it was left, by one rank or several."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from sora_lightning.callbacks.writers import LatentWriter
from sora_lightning.data import LatentCache, VideoDataModule
from sora_lightning.data.decoding.shards import write_shards
from sora_lightning.systems import TokenizerSystem
from sora_lightning.tokenizers import ConvTokenizer
from sora_lightning.types import VideoBatch
from tests.data.conftest import shapes
from tests.data.modules import data_module
from tests.data.test_datamodule import trainer
from tests.hostile import HOSTILE

__all__ = ["shapes"]


class Counting(TokenizerSystem):
    """Counts what it encodes, and may stop midway."""

    def __init__(self, stop: int = 10**9, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(ConvTokenizer(4, [8, 16], [True], [True], patch=4, blocks_per_level=1))
        self.stop, self.encoded = stop, 0

    def predict_step(self, batch: VideoBatch, batch_idx: int) -> torch.Tensor:
        if self.encoded >= self.stop:
            raise RuntimeError("power cut")
        self.encoded += len(batch)
        return super().predict_step(batch, batch_idx)


def predict(system: Counting, manifest: Path, root: Path, place: tuple[int, int] = (0, 1)) -> None:
    class Share(VideoDataModule):
        def _ranks(self) -> tuple[int, int]:
            return place

    data = data_module(
        manifest, ["9x16x16", "9x16x24"], 8.0, 4 * 9 * 16 * 24, Share, windows_per_clip=2
    )
    one = trainer(root.parent, callbacks=[LatentWriter(root, "float32")])
    one.predict(system, data, return_predictions=False)


@pytest.fixture
def whole(shapes: dict[str, Path], tmp_path: Path) -> LatentCache:
    predict(Counting(), shapes["train"], tmp_path / "whole")
    return LatentCache.open(tmp_path / "whole")


def same(root: Path, other: LatentCache) -> bool:
    cache = LatentCache.open(root)
    names = cache.keys()
    assert names == other.keys()
    return all(torch.allclose(cache.read(k), other.read(k), atol=1e-5) for k in names)


def test_a_predict_cut_short_goes_on_and_encodes_nothing_twice(
    whole: LatentCache, shapes: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "parts"
    first, second, third = Counting(stop=20), Counting(), Counting()
    with pytest.raises(RuntimeError, match="power cut"):
        predict(first, shapes["train"], root)
    assert len(LatentCache.open(root)) == first.encoded
    predict(second, shapes["train"], root)
    predict(third, shapes["train"], root)
    assert first.encoded + second.encoded == len(whole) == 60
    assert third.encoded <= 6  # one batch, which shows that the tokenizer is still the same
    assert same(root, whole)


def test_predict_says_what_it_wrote_and_what_it_left_out(
    shapes: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [json.loads(line) for line in shapes["train"].read_text().splitlines()]
    short = shapes["train"].with_name("short.jsonl")
    rows[0]["end_s"] = 0.5
    short.write_text("\n".join(map(json.dumps, rows)))
    root = tmp_path / "latents"
    predict(Counting(), short, root)
    num_bytes = sum(path.stat().st_size for path in root.glob("*.safetensors"))
    clips = len(rows) - 1
    said = caplog.text
    assert f"{root}: latents of {2 * clips} windows, {num_bytes / 1e9:.3g} GB" in said
    assert f"{short}: {clips} of {len(rows)} clips\n" in said
    assert (
        f"1 left out: too short for every size that it covers, e.g. {Path(rows[0]['path']).name}"
        in said
    )


def test_ranks_share_the_work_and_a_run_of_another_number_ends_it(
    whole: LatentCache, shapes: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "shared"
    first = Counting()
    predict(first, shapes["train"], root, (0, 2))
    assert 0 < first.encoded < 60
    second = Counting()
    predict(second, shapes["train"], root)
    assert first.encoded + second.encoded == 60
    assert same(root, whole)


def test_another_tokenizer_is_refused_even_where_nothing_is_left(
    whole: LatentCache, shapes: dict[str, Path], tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").iterdir()}
    with pytest.raises(ValueError, match="the latents were made by tokenizer"):
        predict(Counting(seed=1), shapes["train"], tmp_path / "whole")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").iterdir()}


def test_no_caption_and_no_name_of_a_clip_decides_where_its_latents_are_written(
    shapes: dict[str, Path], tmp_path: Path
) -> None:
    """In a shard a clip may have any name."""
    manifest = write_shards(shapes["train"], tmp_path / "shards")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row, text in zip(rows, HOSTILE, strict=False):
        row |= {"path": text, "caption": text}
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    root = tmp_path / "latents"
    before = {path for path in tmp_path.rglob("*") if path != root}
    predict(Counting(), manifest, root)
    written = {path for path in tmp_path.rglob("*") if path != root} - before
    assert len(LatentCache.open(root)) == 2 * len(rows)
    assert {path.parent for path in written} == {root}
    assert all(re.fullmatch(r"index.json|[0-9a-f]{32}\.safetensors", path.name) for path in written)
