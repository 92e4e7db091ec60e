"""Batches of the DataModule: from files, from the cache, and after a resume by Lightning."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import Tensor

from sora_lightning.data import LatentCache, PyAVReader, VideoDataModule, read_manifest
from sora_lightning.types import VideoBatch
from tests.data.modules import data_module

SIZES = ["9x16x16", "9x12x20", "9x20x12"]
BUDGET = 4 * 9 * 16 * 16


def module(shapes: dict[str, Path], **settings: object) -> VideoDataModule:
    options = {"sizes": SIZES, "fps": 8.0, "pixels_per_batch": BUDGET} | settings
    return data_module(shapes["train"], **options)  # type: ignore[arg-type]


class Recorder(L.LightningModule):
    """Keeps what it is fed: ids, captions and the sum of the values of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fed: list[tuple[list[str], list[str], float]] = []

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
        self.fed.append((batch.clip_ids, batch.captions, float(batch.video.sum())))
        return self.weight * 0

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> None:
        self.fed.append((batch.clip_ids, batch.captions, float(batch.video.sum())))

    def predict_step(self, batch: VideoBatch, batch_idx: int) -> tuple[list[str], Tensor]:
        return batch.clip_ids, encode(batch.video)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def encode(video: Tensor) -> Tensor:
    """Stands in for a tokenizer."""
    return video[:, :, ::4, ::4, ::4].repeat(1, 2, 1, 1, 1)


def trainer(folder: Path, **settings: object) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "default_root_dir": folder,
    }
    return L.Trainer(**(quiet | {"enable_checkpointing": False} | settings))


def fit(
    shapes: dict[str, Path], folder: Path, steps: int, resume: Path | None = None, workers: int = 0
) -> list:
    recorder = Recorder()
    saving = L.pytorch.callbacks.ModelCheckpoint(folder, "last", every_n_train_steps=1)
    one = trainer(folder, max_steps=steps, callbacks=[saving], enable_checkpointing=True)
    data = module(shapes, steps_per_epoch=4, num_workers=workers)
    one.fit(recorder, data, ckpt_path=resume)
    return recorder.fed


@pytest.mark.parametrize(("stop", "workers"), [(6, 2), (8, 0)])
def test_a_run_that_lightning_resumes_sees_the_same_clips(
    stop: int, workers: int, shapes: dict[str, Path], tmp_path: Path
) -> None:
    whole = fit(shapes, tmp_path / "whole", 11)
    first = fit(shapes, tmp_path / "parts", stop)
    second = fit(shapes, tmp_path / "parts", 11, tmp_path / "parts" / "last.ckpt", workers)
    assert len(whole) == 11
    assert first + second == whole


class RankRecorder(Recorder):
    """Writes what each rank was fed into a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self) -> None:
        (self.folder / f"rank{self.global_rank}.json").write_text(json.dumps(self.fed))


@pytest.mark.slow
def test_two_ranks_share_what_one_would_see_and_one_goes_on_alone(
    shapes: dict[str, Path], tmp_path: Path
) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()
    saving = L.pytorch.callbacks.ModelCheckpoint(together, "last", every_n_train_steps=1)
    data = module(shapes, run_length=2, steps_per_epoch=4, num_workers=1)
    ddp = trainer(
        together, max_steps=3, devices=2, strategy="ddp_spawn", callbacks=[saving],
        enable_checkpointing=True,
    )  # fmt: skip
    ddp.fit(RankRecorder(together), data)
    ranks = [json.loads((together / f"rank{rank}.json").read_text()) for rank in range(2)]
    shared = [batch for step in zip(*ranks, strict=True) for batch in step]
    recorder = Recorder()
    trainer(alone, max_steps=10).fit(recorder, module(shapes, run_length=2))
    assert shared == [list(batch) for batch in recorder.fed[:6]]
    second = Recorder()
    trainer(alone, max_steps=5).fit(second, module(shapes), ckpt_path=together / "last.ckpt")
    assert second.fed == recorder.fed[6:8]


def test_batches_keep_budget_size_range_and_rate(shapes: dict[str, Path]) -> None:
    data = module(shapes, steps_per_epoch=12, run_length=1)
    data.setup("fit")
    captions = {r.clip_id: r.captions for r in read_manifest(shapes["train"])}
    shapes_seen = set()
    for batch in data.train_dataloader():
        assert batch.video.dtype is torch.float32
        assert 0.2 < batch.video.abs().max() <= 1
        assert batch.video[0, 0].numel() * len(batch) <= BUDGET
        assert batch.fps == 8.0
        assert all(c in captions[i] for c, i in zip(batch.captions, batch.clip_ids, strict=True))
        shapes_seen.add("x".join(map(str, batch.video.shape[2:])))
    assert shapes_seen == set(SIZES)


def test_windows_and_wordings_change_from_pass_to_pass_but_not_with_workers(
    shapes: dict[str, Path],
) -> None:
    drawn = []
    for workers in (0, 2):
        data = module(shapes, sizes=SIZES[:1], num_workers=workers, steps_per_epoch=20)
        data.setup("fit")
        drawn.append(list(data.train_dataloader()))
    views: dict[str, list[tuple[str, Tensor]]] = {}
    for one, other in zip(*drawn, strict=True):
        assert one.captions == other.captions
        torch.testing.assert_close(one.video, other.video, atol=0, rtol=0)
        for name, caption, video in zip(one.clip_ids, one.captions, one.video, strict=True):
            views.setdefault(name, []).append((caption, video))
    twice = [seen for seen in views.values() if len(seen) > 1]
    assert len(twice) > 10
    assert sum(a[0] != b[0] for a, b, *_ in twice) > len(twice) / 3
    assert sum(not torch.equal(a[1], b[1]) for a, b, *_ in twice) > len(twice) / 3


def test_the_readers_serve_the_same_batches(shapes: dict[str, Path]) -> None:
    pytest.importorskip("decord")
    batches = []
    for reader in (None, PyAVReader()):
        data = module(shapes, reader=reader)
        data.setup("fit")
        batches.append(next(iter(data.train_dataloader())))
    torch.testing.assert_close(batches[0].video, batches[1].video, atol=0, rtol=0)


def test_validation_sees_every_clip_once_and_the_same_each_time(
    shapes: dict[str, Path], tmp_path: Path
) -> None:
    runs = []
    for seed in (0, 1):
        recorder = Recorder()
        data = module(shapes, val_manifest=shapes["val"], seed=seed)
        trainer(tmp_path).validate(recorder, data, verbose=False)
        runs.append(recorder.fed)
    assert runs[0] == runs[1]
    seen = {i: c for ids, captions, _ in runs[0] for i, c in zip(ids, captions, strict=True)}
    expected = {r.clip_id: r.captions[0] for r in read_manifest(shapes["val"])}
    assert seen == expected
    with pytest.raises(ValueError, match="val_manifest is not set"):
        module(shapes).setup("validate")


def test_clips_of_statistics_are_those_that_predict_encodes_spread_over_the_manifest(
    shapes: dict[str, Path],
) -> None:
    longer = ["13x16x16", "13x12x20", "13x20x12"]
    data = module(shapes, val_manifest=shapes["val"], predict_sizes=longer)
    data.setup("fit")
    few, every = ([*data.statistics_dataloader(count)] for count in (10, 100))
    places = {r.clip_id: place for place, r in enumerate(read_manifest(shapes["train"]))}
    assert sorted(places[i] for batch in every for i in batch.clip_ids) == [*range(30)]
    sizes = sorted({"x".join(map(str, batch.video.shape[2:])) for batch in every})
    assert sizes == sorted(longer)
    found = [places[i] for batch in few for i in batch.clip_ids]
    assert len(set(found)) == len(found)
    assert 10 <= len(found) <= 12  # each size is rounded up
    assert min(found) < 5
    assert max(found) >= 22
    # What is trained on stays as it was.
    assert {str(size) for size in data.check()[shapes["train"]].clips} == set(SIZES)
    far = module(shapes, predict_sizes=["99x16x16"], pixels_per_batch=10**5)
    with pytest.raises(ValueError, match=r"no clip is left for 99x16x16 at 8\.0"):
        far.statistics_dataloader(10)


def write_cache(shapes: dict[str, Path], root: Path, **settings: object) -> None:
    data = module(shapes, val_manifest=shapes["val"], windows_per_clip=3, **settings)
    written = trainer(root.parent).predict(Recorder(), data)
    with LatentCache.create(root, "tokenizer-a", "float32") as cache:
        for keys, latents in written or []:
            for key, value in zip(keys, latents, strict=True):
                cache.write(key, value)


def test_cached_latents_are_those_of_the_clips(shapes: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "latents"
    write_cache(shapes, root)
    clips = len(read_manifest(shapes["train"])) + len(read_manifest(shapes["val"]))
    assert len(LatentCache.open(root)) == 3 * clips
    pixels = module(shapes, val_manifest=shapes["val"])
    cached = module(shapes, val_manifest=shapes["val"], latents=root, windows_per_clip=3)
    for data in (pixels, cached):
        data.setup("fit")
    assert pixels.spec.tokenizer_fingerprint is None
    assert cached.spec.tokenizer_fingerprint == "tokenizer-a"
    pairs = list(zip(pixels.val_dataloader(), cached.val_dataloader(), strict=True))
    for by_pixels, by_cache in pairs:
        assert by_cache.video is None
        assert by_cache.clip_ids == by_pixels.clip_ids
        torch.testing.assert_close(by_cache.latents, encode(by_pixels.video))
    for one, other in zip(pixels.train_dataloader(), cached.train_dataloader(), strict=True):
        assert one.clip_ids == other.clip_ids
        assert one.captions == other.captions


def test_a_cache_made_with_other_settings_is_refused(
    shapes: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "latents"
    write_cache(shapes, root)
    for settings in ({"fps": 6.0}, {"sizes": ["5x16x16"]}, {"windows_per_clip": 2}):
        data = module(shapes, latents=root, **({"windows_per_clip": 3} | settings))
        with pytest.raises(ValueError, match=r"lacks the latents of 30 of 30 .*train\.jsonl"):
            data.setup("fit")
    with pytest.raises(ValueError, match="no latent cache here"):
        module(shapes, latents=tmp_path / "absent").setup("fit")
    both = {"train": shapes["train"], "val": shapes["test"]}
    with pytest.raises(ValueError, match=r"lacks the latents of 10 of 10 clips of .*test\.jsonl"):
        module(both, val_manifest=both["val"], latents=root, windows_per_clip=3).setup("fit")


def test_a_file_that_changed_since_it_was_encoded_is_left_out(
    shapes: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = shapes["train"].parent
    rows = [json.loads(line) for line in shapes["train"].read_text().splitlines()]
    for row in rows:
        (tmp_path / Path(row["path"]).name).write_bytes((root / row["path"]).read_bytes())
        row["path"] = Path(row["path"]).name
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    copied = {**shapes, "train": tmp_path / "train.jsonl"}
    write_cache(copied, tmp_path / "latents")
    with (tmp_path / "00003.mp4").open("ab") as file:
        file.write(b"x")
    data = module(copied, latents=tmp_path / "latents", windows_per_clip=3, steps_per_epoch=40)
    data.setup("fit")
    changed = read_manifest(copied["train"])[3].clip_id
    served = {name for batch in data.train_dataloader() for name in batch.clip_ids}
    assert changed not in served
    assert len(served) == 29
    assert "1 left out: not in the latent cache" in caplog.text


def with_bad_clips(shapes: dict[str, Path], folder: Path, declared: bool) -> Path:
    """The training manifest, and three rows more: a text, a file cut off, and a clip too small."""
    root = shapes["train"].parent
    rows = [json.loads(line) for line in shapes["train"].read_text().splitlines()[:6]]
    bad = {"text.mp4": b"no video", "cut.mp4": (root / rows[0]["path"]).read_bytes()[:900]}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    technical = {"fps": 8, "num_frames": 20, "height": 64, "width": 64} if declared else {}
    rows += [{"path": str(folder / name), "caption": "x", **technical} for name in bad]
    rows.append({**rows[0], "path": str(root / rows[0]["path"]), "start_s": 2.0})
    for row in rows:
        row["path"] = str(root / row["path"])
    path = folder / "clips.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("declared", [False, True], ids=["probed", "declared"])
def test_bad_clips_are_left_out_and_named(
    declared: bool, shapes: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = with_bad_clips(shapes, tmp_path, declared)
    recorder = Recorder()
    data = module({"train": manifest}, sizes=SIZES[:1], max_bad_share=0.3, root="/")
    for _ in range(2):
        trainer(tmp_path / "run", max_steps=8).fit(recorder, data)
    assert all(len(ids) == 4 for ids, _, _ in recorder.fed)
    used = {name for ids, _, _ in recorder.fed for name in ids}
    records = {record.clip_id: record for record in read_manifest(manifest, root="/")}
    assert {records[name].path.name for name in used} == {f"{i:05d}.mp4" for i in range(6)}
    lines = (tmp_path / "run" / "bad_clips.jsonl").read_text().splitlines()
    named = {Path(json.loads(line)["path"]).name: json.loads(line)["reason"] for line in lines}
    assert set(named) == {"text.mp4", "cut.mp4"}
    assert len(lines) == 2
    assert "Invalid data" in named["text.mp4"]
    table = data.check()[manifest].removed
    removed = {r.path.name: why.name for why, records in table.items() for r in records}
    expected = {} if declared else {"text.mp4": "UNREADABLE", "cut.mp4": "UNREADABLE"}
    assert removed == {"00000.mp4": "TOO_SHORT", **expected}
    assert "jsonl: not every clip takes part:" in caplog.text
    assert "1 left out: too short" in caplog.text


def test_a_manifest_of_which_nothing_is_left_is_an_error_with_the_reasons(
    shapes: dict[str, Path],
) -> None:
    with pytest.raises(ValueError, match=r"(?s)no clip is left.*30 left out: smaller than every"):
        module(shapes, sizes=["9x512x512"], pixels_per_batch=10**9).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": ["16x16"]}, "'16x16' is not a video size"),
        ({"pixels_per_batch": 100}, "pixels_per_batch = 100"),
        ({"fps": 0.0}, "fps = 0"),
        ({"windows_per_clip": 0}, "windows_per_clip = 0"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module({"train": Path("never read")}, **settings)


def test_fewer_batches_than_ranks_are_refused(
    shapes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = module(shapes, val_manifest=shapes["val"])
    data.setup("fit")
    num_batches = len(data.val_dataloader())
    places = {"rank": 0, "num_replicas": num_batches + 1}
    folders = dict.fromkeys(("log_dir", "default_root_dir"), "unused")
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        distributed_sampler_kwargs=places, strategy=None, limit_val_batches=1.0, **folders
    )
    said = (
        f"{num_batches} batches for {num_batches + 1} ranks: every rank needs one; lower data.batch"
    )
    with pytest.raises(ValueError, match=said):
        data.val_dataloader()


def test_a_whole_frame_rate_is_the_same_rate(shapes: dict[str, Path]) -> None:
    """An integer rate gives the keys of the float one, and a float in the batch."""
    whole, real = (module(shapes, fps=fps) for fps in (8, 8.0))
    (record, *_), size = read_manifest(shapes["train"]), whole.sizes.sizes[0]
    assert whole._key(record, size, 0) == real._key(record, size, 0)
    whole.setup("fit")
    assert isinstance(next(iter(whole.train_dataloader())).fps, float)
